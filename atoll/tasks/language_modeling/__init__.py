"""Causal language models: the next token of texts, of answers, of an assistant's turns."""
