"""Multi-label classification of texts and regression on texts: heads on features of a text encoder."""
