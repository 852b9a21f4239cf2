"""Text to text: encoder and decoder, of translations, summaries and answers."""
