"""Simulated clients: how data is parted among them, and how their devices behave."""
