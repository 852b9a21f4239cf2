"""A run from its directory to its result: checkpoints, the test set, what is reported."""
