"""What each client's updates did for the model: a file a method, and how a run measures it."""
