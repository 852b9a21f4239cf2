"""Survival analysis: predicts how soon an event happens, from data with censored patients."""
