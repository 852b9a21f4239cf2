"""Compressed updates made whole before anything else looks at them.

A message has the form that the job and the model say, or it is set aside: what it claims never makes
the server take more memory than a model does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from atoll.job.job import Job
from atoll.protocol.compression import Compression, apart, decompress, misshapen, unsound
from atoll.protocol.messages import Failure, Reply, Update
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class Decompression:
    """A transform of replies: whole updates in place of compressed ones, as the job compresses them."""

    job: Job

    def __call__(self, replies: Iterable[Reply], model: Tensors) -> Iterable[Reply]:
        return decompressed(replies, self.job, model)


def decompressed(replies: Iterable[Reply], job: Job, model: Tensors) -> Iterable[Reply]:
    """The replies with whole updates; of a bad one its client's name and the reason.

    Where clients are promised privacy the look is blind, and no value is a reason: an update that can't
    be is not finite then, and counts as zero where it is clipped. Updates that protect examples are
    noised already, so that their values may be looked at.
    """
    how, blind = Compression.of(job, model), "client" in job.privacy.units
    if how is None:
        return replies
    if isinstance(replies, StackedUpdates) and _is_well_formed(replies, how, blind=blind):
        return replace(replies, delta=apart(decompress(replies.delta, how), model))
    return (_whole(reply, how, model, blind=blind) for reply in replies)


def _is_well_formed(updates: StackedUpdates, how: Compression, *, blind: bool) -> bool:
    found = {name: (tuple(t.shape[1:]), t.dtype) for name, t in updates.delta.items()}
    if found != {name: ((count,), dtype) for name, (count, dtype) in how.form.items()}:
        return False
    return blind or not any(bool(mask.any()) for mask in unsound(updates.delta, how).values())


def _whole(reply: Reply, how: Compression, model: Tensors, *, blind: bool) -> Reply:
    if not isinstance(reply, Update):
        return reply
    fault = misshapen(reply.delta, how)
    if fault is not None:
        return Failure(reply.client, f"compressed update: {fault}")
    packed = {name: tensor.unsqueeze(0) for name, tensor in reply.delta.items()}
    faults = [fault for fault, mask in unsound(packed, how).items() if bool(mask.any())]
    if faults and not blind:
        return Failure(reply.client, f"compressed update: {faults[0]}")
    whole = apart(decompress(packed, how), model)
    return replace(reply, delta={name: tensor[0] for name, tensor in whole.items()})
