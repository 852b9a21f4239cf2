"""Strategies whose updates were made from models that others have moved on from meanwhile."""
