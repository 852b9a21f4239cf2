"""Merges that hold against hostile clients: one rule a file, on rows of float64, [clients, numbers]."""
