"""Caching the outputs of the frozen blocks below the first tuned one, for every sequence of tokens."""
