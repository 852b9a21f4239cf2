"""State that clients keep between rounds, and the methods that use it."""
