"""Question answering with encoder and decoder."""
