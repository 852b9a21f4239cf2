"""Strategies whose clients send a bit or two for each number of the model."""
