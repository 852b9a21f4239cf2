"""Merge rules that are robust to hostile clients: one file each, on float64 rows [clients, numbers]."""
