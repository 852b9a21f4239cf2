"""Atoll: federated fine-tuning, the same bits in simulation and in deployment."""

__version__ = "0.1.0"
