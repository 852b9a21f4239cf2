"""Coordination: rounds, cohort sampling, checkpoints, serving, provisioning."""
