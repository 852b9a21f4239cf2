"""Token classification: predicts a tag for each word, and so the entities in a sentence."""
