"""What a client says of its features for a head in closed form: sums, and nothing of a single example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.protocol.messages import Measurement
from atoll.strategies.closed_form import STATISTICS


def statistics(learner: Learner, round: int, shards: Mapping[str, Shard]) -> Iterator[Measurement]:
    """Each client's statistics of its training part as it is, also where training varies it.

    A client's own matrix products alone make them, so they are the same bits whoever else is asked.
    """
    kind, classes = learner.job.tune.head_init, len(learner.data_info["classes"])
    assert kind is not None
    for name, shard in shards.items():
        found = STATISTICS[kind](learner.features(shard), shard.table, classes)
        yield Measurement(name, round, len(shard), found)
