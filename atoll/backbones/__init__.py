"""Backbones: which one a job names, its checkpoint, and encoders for each kind of input."""
