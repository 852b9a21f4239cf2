"""Strategies that train more than one model; each client uses the one that fits it."""
