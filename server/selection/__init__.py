"""Rules by which a round's clients are chosen, where chances aren't even: a file a rule."""
