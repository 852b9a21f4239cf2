"""Strategies for clients whose shards differ, by what their local training adds to the loss."""
