"""Survival: how soon an event comes, of patients of whom some are never seen to have it."""
