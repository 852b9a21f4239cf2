"""Intents and slots of commands, written or spoken."""
