"""Speech recognition with connectionist temporal classification (CTC)."""
