"""A site: its shard, local training, policy."""
