"""Clients that are hostile on purpose, so that a merge can be tried against them."""
