"""Mechanisms, accounting and audit of differential privacy."""
