"""Strategies that are fair to clients: the worse the model is for one, the more its update counts."""
