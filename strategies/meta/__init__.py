"""Strategies whose model is for adapting: a few local steps from it lead far at every client."""
