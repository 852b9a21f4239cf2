"""Strategies for clients whose shards differ, which add terms to the loss of local training."""
