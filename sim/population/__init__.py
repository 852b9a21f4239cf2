"""Simulated clients: how data is partitioned among them, and how their devices behave."""
