"""Text to text with encoder-decoder models: translations, summaries and answers."""
