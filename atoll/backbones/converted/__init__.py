"""Weights that packages carry in other forms, written once as the folders that transformers reads."""
