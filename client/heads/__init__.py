"""Local training of heads on features, many clients at once."""
