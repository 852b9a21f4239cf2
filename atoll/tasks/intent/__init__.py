"""Intent and slot prediction for voice commands, written or spoken."""
