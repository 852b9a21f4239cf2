"""Recommendation: predicts the next item of a user's history."""
