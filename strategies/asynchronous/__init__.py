"""Asynchronous strategies: an update may start from an older model than the one it is merged into."""
