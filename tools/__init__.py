"""What checks the house itself; no part of Atoll."""
