"""Preferences: of two completions the better one, learnt by direct preference optimisation."""
