"""Rules that sample a round's clients with unequal probabilities, one file each."""
