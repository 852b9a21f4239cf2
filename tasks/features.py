"""Features of a frozen backbone, computed once for every example, kept on disk.

An example's features depend on its own content, the backbone's weights and the preparation
of inputs, never on another example: batches have fixed shapes and one thread each. A
simulator and a site therefore get the same bits, and a cache can be shared between runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from protocol.errors import DataError
from protocol.job import BackboneSection
from tasks.feature_cache import FeatureCache
from tasks.seam import Batch, Encoder, Shard
from tasks.weights import Backbone

BATCH = 16
"""Rows of every batch that features are computed in; part of the cache's key."""

FORMAT = 2
"""Of the files that features are kept in."""

CHUNK = 2048
"""Examples after which features are put on the disk: no more than these are lost in a kill."""

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all)."""


def cache_key(backbone: Backbone, section: BackboneSection, threads: int) -> str:
    """SHA-256 over everything but the example that a feature's bits depend on."""
    import torchvision
    import transformers

    parts = {
        "format": FORMAT,
        "weights": backbone.fingerprint,
        "name": backbone.name,
        "max_tokens": section.max_tokens,
        "image_size": section.image_size,
        "pool": section.pool,
        "batch": BATCH,
        "threads": threads,
        "versions": [torch.__version__, torchvision.__version__, transformers.__version__],
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def extract(
    encoder: Encoder, inputs: Sequence[Any], *, threads: int, device: str, progress: Progress | None = None
) -> torch.Tensor:
    """Features [len(inputs), width] in float32, by as many workers as the machine has cores.

    Every worker computes with `threads` threads, so the number of workers changes no bit.

    Raises:
        DataError: a feature isn't finite.
    """
    out = torch.empty((len(inputs), encoder.width))
    done = 0
    encoder = encoder.to(device).eval()

    def run(item: tuple[list[int], Batch]) -> list[int]:
        torch.set_num_threads(threads)
        rows, batch = item
        with torch.inference_mode():
            features = encoder({k: v.to(device) for k, v in batch.items()})[: len(rows)]
        out[torch.tensor(rows)] = features.to("cpu", torch.float32)
        return rows

    workers = max(1, (os.cpu_count() or 1) // threads) if device == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        for rows in _lazily(pool, run, encoder.fixed_batches(inputs, BATCH), 2 * workers):
            done += len(rows)
            if progress is not None:
                progress(done, len(inputs))
    if not torch.isfinite(out).all():
        bad = int((~torch.isfinite(out).all(dim=1)).nonzero()[0])
        raise DataError(f"example {bad + 1} has features that are not finite")
    return out


def _lazily(pool: ThreadPoolExecutor, run: Any, items: Any, ahead: int) -> Any:
    """`pool.map` that prepares only a few items ahead of the work."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(run, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def cached_features(
    cache: FeatureCache,
    shard: Shard,
    encoder: Callable[[], Encoder],
    *,
    threads: int,
    device: str,
    progress: Progress | None = None,
) -> torch.Tensor:
    """A shard's features [n, width]; the backbone is loaded only if some are missing."""
    missing = cache.missing(shard.keys)
    for start in range(0, len(missing), CHUNK):
        rows = missing[start : start + CHUNK]
        told = None if progress is None else partial(_told_from, progress, start, len(missing))
        inputs = [shard.inputs[row] for row in rows]
        features = extract(encoder(), inputs, threads=threads, device=device, progress=told)
        cache.put([shard.keys[row] for row in rows], features)
    return cache.take(shard.keys)


def _told_from(progress: Progress, start: int, total: int, done: int, part: int) -> None:
    """Progress of a part as progress of the whole."""
    progress(start + done, total)
