"""Strategies that train a model for adaptation: a few local steps make it good for any client."""
