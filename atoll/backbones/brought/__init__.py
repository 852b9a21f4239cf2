"""Backbones and augmentations that extensions bring."""
