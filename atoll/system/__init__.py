"""Caches, locks, child processes, signals, files that last."""
