"""Inputs that were decoded once and are kept, as long as they fit: the same every epoch and round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atoll.backbones.encoder import Encoder, Preprocessed
from atoll.data.lazy import take_many
from atoll.data.shard import Shard

MAX_CACHED_BYTES = 512 << 20
"""Of a process, for one learner; what was needed least recently is let go."""


class ReadyInputs:
    """What an encoder makes of single examples, by the hash of each example's content."""

    def __init__(self, kept_bytes: int = MAX_CACHED_BYTES) -> None:
        self._limit = kept_bytes
        self._kept: dict[bytes, Preprocessed] = {}
        self._bytes = 0

    def of(self, encoder: Encoder, shard: Shard, rows: Sequence[int]) -> list[Preprocessed]:
        """Those rows of a shard, ready for a batch; the caller must not write into them."""
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
    """Bytes that an input takes."""
    return ready.nbytes if isinstance(ready, torch.Tensor) else sum(t.nbytes for t in ready.values())
