"""A real federation's server: its processes, the public reverse proxy, provisioning, submitting jobs."""
