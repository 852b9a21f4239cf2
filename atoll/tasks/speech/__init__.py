"""Speech recognition with CTC."""
