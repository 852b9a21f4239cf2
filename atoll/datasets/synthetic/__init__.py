"""Generated data: made by a rule and a seed, of no person and no place; for tests, demos and pretraining.

Whatever is made of it says so by a name that begins with "generated-". Each function returns the splits
"train" and "test", and the same bytes for the same seed. No example of the test split is in the training
split.
"""
