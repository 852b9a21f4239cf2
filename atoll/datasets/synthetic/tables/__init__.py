"""Data whose examples are rows of numbers and names."""
