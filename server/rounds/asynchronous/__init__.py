"""Asynchronous rounds: clients go on training while the server merges other clients' updates."""
