"""Texts with several labels at once, and texts with a number: heads on features of a text encoder."""
