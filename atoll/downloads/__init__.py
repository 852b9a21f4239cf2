"""Packages that carry data and weights, pinned by their hash; nothing of theirs is run."""
