"""What a client keeps between rounds."""
