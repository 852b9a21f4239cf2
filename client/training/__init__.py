"""Local training of a network: batches, optimizers, precision, many clients at once."""
