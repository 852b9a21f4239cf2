"""The page that shows a run: its sections, plots and sentences."""
