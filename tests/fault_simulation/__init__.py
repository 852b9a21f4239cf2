"""Whole federations under faults that a seed decides: all is real but clock, network and disks."""
