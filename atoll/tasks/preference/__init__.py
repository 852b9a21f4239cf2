"""Preference learning from pairs of completions by direct preference optimisation (DPO)."""
