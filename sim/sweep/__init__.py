"""A grid of runs: what is run, what is kept, its table and plot."""
