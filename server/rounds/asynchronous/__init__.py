"""Rounds that don't wait for one another: clients train while others' updates are merged."""
