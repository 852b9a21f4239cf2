"""Multiple choice: trains on the right choice's text, and measures likelihoods and written answers."""
