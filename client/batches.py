"""The order of a client's examples in a round: from the client's own stream, the same everywhere."""

from __future__ import annotations

import torch

from protocol.job import Job
from protocol.streams import stream


def batches(count: int, job: Job, round: int, client: str) -> list[list[int]]:
    """Rows of every batch of a round's local epochs; each epoch is a fresh permutation.

    The last batch of an epoch may be smaller; no row is dropped.
    """
    size = job.train.batch_size
    out: list[list[int]] = []
    for epoch in range(job.train.epochs):
        order = torch.randperm(count, generator=stream(job.seed, "shuffle", round, client, epoch)).tolist()
        out += [order[start : start + size] for start in range(0, count, size)]
    return out
