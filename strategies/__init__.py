"""How updates merge into the next global model: pure functions on tensors."""
