"""Compresses a client's updates, and stores the compression error for the next update (error feedback).

Under example-level privacy all of this is post-processing: it reads the noised update and the errors of
earlier ones, nothing else of the client's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from atoll.client.state.store import ClientStateStore
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.protocol.compression import DRAWN, Compression, compress, decompress, flat
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import ModelRequest
from atoll.protocol.stacked_updates import StackedUpdates, joined, stacked

ERROR_KEY = "compression.error"
"""The name of the stored error, [numbers]: the part of its updates that a client has not delivered so far."""
NUMBERS_PER_BLOCK = 1 << 24
"""How many numbers are compressed together."""


def compressed(
    updates: Iterable[Update], request: ModelRequest, job: Job, memory: ClientStateStore
) -> Iterable[Update]:
    """The updates, compressed as the job says; the errors are stored before the updates are returned.

    Raises:
        DataError: a stored error is damaged.
        JobError: an error can't be stored.
    """
    how = Compression.of(job, request.tensors)
    if how is None:
        return updates
    if not isinstance(updates, StackedUpdates):
        return (_compressed(stacked([update]), how, request, job, memory)[0] for update in updates)
    size = max(1, NUMBERS_PER_BLOCK // max(1, how.numbers))
    parts = [updates.take(range(start, len(updates))[:size]) for start in range(0, len(updates), size)]
    return joined([_compressed(part, how, request, job, memory) for part in parts])


def _compressed(
    updates: StackedUpdates, how: Compression, request: ModelRequest, job: Job, memory: ClientStateStore
) -> StackedUpdates:
    vectors = flat(updates.delta)
    if not job.feeds_errors_back:
        uniform = _coins(updates.clients, how, job, request.round)
        return replace(updates, delta=compress(vectors, how, uniform))
    error = remembered(updates.clients, how, request, memory)
    meant = vectors + error
    packed = compress(meant, how)
    lost = meant - decompress(packed, how)
    # What the server will set aside delivers nothing, and must not spoil what is remembered.
    sound = torch.isfinite(lost).all(dim=1, keepdim=True)
    lost = torch.where(sound, lost, error)
    states = {client: {ERROR_KEY: left.clone()} for client, left in zip(updates.clients, lost, strict=True)}
    if job.personal.keep is not None:  # which is in this round's memory already
        beside = {client: memory.load_before(request.run, client, request.round + 1) for client in states}
        states = {client: beside[client] | state for client, state in states.items()}
    memory.save(request.run, request.round, states)
    return replace(updates, delta=packed)


def _coins(clients: Sequence[str], how: Compression, job: Job, round: int) -> torch.Tensor | None:
    """Each client's uniform numbers for what is rounded, or gets a sign, at random; None where nothing is."""
    if how.scheme not in DRAWN:
        return None
    drawn = [
        torch.rand(how.numbers, generator=stream(job.seed, "rounding", round, client), dtype=torch.float64)
        for client in clients
    ]
    return torch.stack(drawn)


def remembered(
    clients: Sequence[str], how: Compression, request: ModelRequest, memory: ClientStateStore
) -> torch.Tensor:
    """The clients' stored errors, [clients, numbers]; zeros at the start."""
    errors = torch.zeros((len(clients), how.numbers))
    for row, client in zip(errors, clients, strict=True):
        state = memory.load_before(request.run, client, request.round)
        if not state:
            continue
        if ERROR_KEY not in state or state[ERROR_KEY].shape != row.shape:
            raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
        row.copy_(state[ERROR_KEY])
    return errors
