"""Searches for hyper-parameters and for a backbone."""
