"""Local training under differential privacy, and what it charges."""
