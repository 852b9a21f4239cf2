"""Decompresses updates before anything else inspects them.

A message whose shapes are not those that job and model imply is set aside, so no message can make the server
allocate more memory than one model takes.
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
    """A reply transform that decompresses each update as the job's `federation.compression` says."""

    job: Job

    def __call__(self, replies: Iterable[Reply], model: Tensors) -> Iterable[Reply]:
        return decompressed(replies, self.job, model)


def decompressed(replies: Iterable[Reply], job: Job, model: Tensors) -> Iterable[Reply]:
    """The replies with decompressed updates; a malformed one becomes a `Failure` with the reason.

    Under client-level privacy only shapes are checked: a value that cannot occur decompresses to one that is
    not finite, and the update counts as zero when it is clipped. Under example-level privacy updates carry
    their noise already, so their values may be checked.
    """
    how, blind = Compression.of(job, model), "client" in job.privacy.units
    if how is None:
        return replies
    if isinstance(replies, StackedUpdates) and _is_well_formed(replies, how, blind=blind):
        return replace(replies, delta=apart(decompress(replies.delta, how), model))
    return (_whole(reply, how, model, blind=blind) for reply in replies)


def _is_well_formed(updates: StackedUpdates, how: Compression, *, blind: bool) -> bool:
    forms = {name: (tuple(t.shape[1:]), t.dtype) for name, t in updates.delta.items()}
    if forms != {name: ((count,), dtype) for name, (count, dtype) in how.form.items()}:
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
