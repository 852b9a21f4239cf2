"""Attacks on a run, which check the epsilon that it claims."""
