"""A real federation's server: processes, the public door, kits, submitting jobs."""
