"""Forecasting of series."""
