"""Causal language modelling: predicts the next token of texts, answers, or an assistant's turns."""
