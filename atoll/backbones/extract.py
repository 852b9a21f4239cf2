"""Features of a frozen backbone: the same bits whatever other examples there are beside."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Variation
from atoll.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

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
    at_once: bool = True,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(rows, the network's output for them) of each batch, in the batches' order, without the padding.

    On a CPU, batches are computed side by side by as many workers as the machine has cores, if `at_once`.
    """

    def run(item: FixedBatch) -> tuple[list[int], torch.Tensor]:
        rows, prepare = item
        with torch.inference_mode():
            return rows, network({k: v.to(device) for k, v in prepare().items()})[: len(rows)].cpu()

    workers = workers_on(device, threads) if at_once else 1
    return side_by_side(run, batches, workers=workers, threads=threads)


def workers_on(device: str, threads: int) -> int:
    """How many can compute at once with so many threads each: on a CPU as many as it has cores for."""
    return max(1, (os.cpu_count() or 1) // threads) if torch.device(device).type == "cpu" else 1


def side_by_side(
    run: Callable[[Item], Result], items: Iterable[Item], *, workers: int, threads: int
) -> Iterator[Result]:
    """What `run` makes of each item, in the items' order; few items are taken ahead of the work."""

    def with_threads(item: Item) -> Result:
        torch.set_num_threads(threads)
        return run(item)

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(with_threads, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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
