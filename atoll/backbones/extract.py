"""Features of a frozen backbone: the same bits whatever other examples there are beside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Variation
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
    batches = encoder.fixed_batches(inputs, BATCH, variation)
    for rows, features in compute_batches(batches, encoder, threads=threads, device=device):
        out[torch.tensor(rows)] = features.to(torch.float32)
        done += len(rows)
        if progress is not None:
            progress(done, len(inputs))
    if not torch.isfinite(out).all():
        bad = int((~torch.isfinite(out).all(dim=1)).nonzero()[0])
        raise DataError(f"example {bad + 1} has features that are not finite")
    return out


def compute_batches(
    batches: Iterable[FixedBatch],
    network: Callable[[Batch], torch.Tensor],
    *,
    threads: int,
    device: str,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(rows, the network's output for them) of each batch, in the batches' order, without the padding.

    On a CPU, batches are computed side by side by as many workers as the machine has cores.
    """

    def run(item: FixedBatch) -> tuple[list[int], torch.Tensor]:
        torch.set_num_threads(threads)
        rows, prepare = item
        with torch.inference_mode():
            return rows, network({k: v.to(device) for k, v in prepare().items()})[: len(rows)].cpu()

    workers = max(1, (os.cpu_count() or 1) // threads) if device == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        yield from _lazily(pool, run, batches, 2 * workers)


def less_padded(batches: Iterable[FixedBatch]) -> Iterator[FixedBatch]:
    """The batches with no more padding than up to the next power of two.

    A row's output then depends on how many rows its batch has, and so on the rows that are computed with
    it: kernels for few rows round otherwise. Rows that are always computed together, as those of a shard
    are when it is measured, have the same bits in a simulation, at a site and after a resume.
    """
    for rows, prepare in batches:
        yield rows, partial(_first, prepare, 1 << (len(rows) - 1).bit_length())


def _first(prepare: Callable[[], Batch], count: int) -> Batch:
    """The first rows of a batch."""
    return {name: tensor[:count] for name, tensor in prepare().items()}


def _lazily(pool: ThreadPoolExecutor, run: Any, items: Any, ahead: int) -> Any:
    """`pool.map` that takes only a few items ahead of the work."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(run, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
