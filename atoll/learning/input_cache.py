"""A cache of decoded inputs in memory, which are the same in every epoch and round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atoll.backbones.encoder import Encoder, Preprocessed
from atoll.data.lazy import take_many
from atoll.data.shard import Shard

MAX_CACHED_BYTES = 512 << 20
"""The memory for one learner's inputs in a process; the least recently used ones are dropped."""


class ReadyInputs:
    """An encoder's preprocessed inputs, by the hash of each example's content."""

    def __init__(self, kept_bytes: int = MAX_CACHED_BYTES) -> None:
        self._limit = kept_bytes
        self._kept: dict[bytes, Preprocessed] = {}
        self._bytes = 0

    def of(self, encoder: Encoder, shard: Shard, rows: Sequence[int]) -> list[Preprocessed]:
        """These rows of a shard, preprocessed; the caller must not write into them."""
        wanted = {shard.keys[row]: row for row in rows}
        ready = {key: self._kept.pop(key) for key in wanted if key in self._kept}
        missing = [key for key in wanted if key not in ready]
        if missing:
            made = encoder.preprocess(take_many(shard.inputs, [wanted[key] for key in missing]))
            ready.update(zip(missing, made, strict=True))
            self._bytes += sum(map(_size, made))
        # Back behind all others: the first ones are those not asked for the longest.
        self._kept.update(ready)
        while self._bytes > self._limit:
            self._bytes -= _size(self._kept.pop(next(iter(self._kept))))
        return [ready[shard.keys[row]] for row in rows]


def _size(ready: Preprocessed) -> int:
    """The memory of an input in bytes."""
    return ready.nbytes if isinstance(ready, torch.Tensor) else sum(t.nbytes for t in ready.values())
