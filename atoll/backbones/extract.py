"""Features of a frozen backbone: the same bits whatever other examples there are beside."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from atoll.backbones.encoder import Encoder, FixedBatch, Variation
from atoll.errors import DataError

BATCH = 16
"""Rows of every batch that features are computed in; part of the key under which they are kept."""

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all)."""


def extract(
    encoder: Encoder,
    inputs: Sequence[Any],
    *,
    threads: int,
    device: str,
    progress: Progress | None = None,
    variation: Variation | None = None,
) -> torch.Tensor:
    """Features [len(inputs), width] in float32, by as many workers as the machine has cores.

    Every worker prepares its batches and computes with `threads` threads, so the number of
    workers changes no bit.

    Raises:
        DataError: a feature isn't finite.
    """
    out = torch.empty((len(inputs), encoder.width))
    done = 0
    encoder = encoder.to(device).eval()

    def run(item: FixedBatch) -> list[int]:
        torch.set_num_threads(threads)
        rows, prepare = item
        with torch.inference_mode():
            features = encoder({k: v.to(device) for k, v in prepare().items()})[: len(rows)]
        out[torch.tensor(rows)] = features.to("cpu", torch.float32)
        return rows

    workers = max(1, (os.cpu_count() or 1) // threads) if device == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        for rows in _lazily(pool, run, encoder.fixed_batches(inputs, BATCH, variation), 2 * workers):
            done += len(rows)
            if progress is not None:
                progress(done, len(inputs))
    if not torch.isfinite(out).all():
        bad = int((~torch.isfinite(out).all(dim=1)).nonzero()[0])
        raise DataError(f"example {bad + 1} has features that are not finite")
    return out


def _lazily(pool: ThreadPoolExecutor, run: Any, items: Any, ahead: int) -> Any:
    """`pool.map` that takes only a few items ahead of the work."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(run, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
