"""Contributions: how much each client's updates improved the model; one file per method of attribution."""
