"""Features of a frozen backbone, computed once per example and cached on disk.

An example's features depend on its own content, the backbone's weights and the preprocessing of inputs, never
on another example: batches have fixed shapes and one thread each. A simulation and a site therefore get the
same bits, and runs can share a cache.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from atoll.backbones.brought.names import (
    BACKBONES,
    augmentations_kept_under,
    brought_augmentations,
    kept_under,
)
from atoll.backbones.encoder import Encoder, Variation
from atoll.backbones.extract import BATCH, Progress, extract
from atoll.backbones.resolve import Backbone, known_width
from atoll.data.lazy import take_many
from atoll.data.shard import Shard
from atoll.job.job import BackboneSection, Job
from atoll.learning.compiled import CompiledEncoder, compiler
from atoll.learning.feature_cache import FeatureCache
from atoll.protocol.random_streams import stream
from atoll.system.cache import cache_root
from atoll.system.installed import version_of

FORMAT = 2
"""The version of the files that hold features."""

STATES_FORMAT = 1
"""The version of how states are computed and stored."""

CHUNK = 2048
"""After so many examples features are written to disk; a kill loses at most these."""


@dataclass(frozen=True)
class View:
    """Plain examples, or examples augmented by `variation` from their keys, with a cache of features."""

    cache: FeatureCache
    variation: Callable[[Sequence[bytes]], Variation] | None = None


@dataclass
class Features:
    """The features of a job's examples, computed where the cache on disk lacks them.

    `load_encoder` gives the backbone; it is called only where something is missing. `progress` is called with
    (done, total) while features are computed.
    """

    job: Job
    backbone: Backbone
    load_encoder: Callable[[], Encoder]
    progress: Progress

    @cached_property
    def _plain(self) -> View:
        return plain_view(self.job, self.backbone)

    @cached_property
    def _views(self) -> list[View]:
        return varied_views(self.job, self.backbone) if self.job.train.augment else [self._plain]

    @cached_property
    def encoder(self) -> Encoder:
        """The backbone for computing features, compiled if the job says so."""
        encoder = self.load_encoder()
        return CompiledEncoder(encoder) if self.job.backbone.compile else encoder

    @cached_property
    def width(self) -> int:
        """The width of features; the backbone is loaded for it only if nothing else tells."""
        for view in (self._plain, *self._views):
            if (cached := view.cache.kept_width) is not None:
                return cached
        width = known_width(self.backbone)
        return width if width is not None else self.load_encoder().width

    def plain(self, shard: Shard) -> torch.Tensor:
        """Features [n, width] of a shard without augmentation, from the cache where possible."""
        return self._of([self._plain], shard)[0]

    def for_training(self, shard: Shard) -> torch.Tensor:
        """Features [views, n, width] for training; one view where inputs are not augmented."""
        return self._of(self._views, shard)

    def keep(self, shard: Shard, *, training: bool) -> None:
        """Compute and cache the shard's missing features on disk; none of them stays in memory."""
        self._keep(self._views if training else [self._plain], shard)

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Cache features [n, width] of plain examples that were computed elsewhere, unless all are there."""
        if self._plain.cache.missing(keys):
            self._plain.cache.put(keys, features)

    def _of(self, views: Sequence[View], shard: Shard) -> torch.Tensor:
        if not len(shard):
            return torch.empty((len(views), 0, self.width))
        self._keep(views, shard)
        out = torch.empty((len(views), len(shard), views[0].cache.width))
        for view, part in zip(views, out, strict=True):
            view.cache.take(shard.keys, part)
        return out

    def _keep(self, views: Sequence[View], shard: Shard) -> None:
        train, missing = self.job.train, [view.cache.missing(shard.keys) for view in views]
        total, done = sum(map(len, missing)), 0
        for view, absent in zip(views, missing, strict=True):
            for start in range(0, len(absent), CHUNK):
                rows = absent[start : start + CHUNK]
                keys = [shard.keys[row] for row in rows]
                features = extract(
                    self.encoder,
                    take_many(shard.inputs, rows),
                    threads=train.threads,
                    device=train.device,
                    progress=partial(_told_from, self.progress, done, total),
                    variation=None if view.variation is None else view.variation(keys),
                )
                view.cache.put(keys, features)
                done += len(rows)


def varied_views(job: Job, backbone: Backbone) -> list[View]:
    """The job's `cached_views`; a view depends on nothing but its number, the seed and the augmentations."""
    code = augmentations_kept_under(job)
    caches = [
        _cache(job, backbone, augment=job.train.augment, seed=job.seed, view=number, **code)
        for number in range(job.train.cached_views or 0)
    ]
    return [View(cache, partial(_variation, job, number)) for number, cache in enumerate(caches)]


def plain_view(job: Job, backbone: Backbone) -> View:
    """The view of plain examples, without augmentation."""
    return View(_cache(job, backbone))


def _variation(job: Job, view: int, keys: Sequence[bytes]) -> Variation:
    """The augmentation of a view; its draws depend on seed, view and content alone, not on the machine."""
    return Variation(
        job.train.augment,
        lambda row: stream(job.seed, "augment", view, keys[row].hex()),
        brought_augmentations(job),
    )


def _cache(job: Job, backbone: Backbone, **more: Any) -> FeatureCache:
    key = cache_key(backbone, job.backbone, job.train.threads, processor=processor(job.train.device), **more)
    return FeatureCache(cache_root() / "features" / key[:32])


def state_cache(job: Job, backbone: Backbone, form: Sequence[str | int]) -> FeatureCache:
    """The cache of the states of a network; `form` tells where it is split and how states are stored."""
    return _cache(job, backbone, states=[STATES_FORMAT, str(dtype_of_states(job)), *form])


def dtype_of_states(job: Job) -> torch.dtype:
    """The dtype in which a job's states are stored."""
    return torch.bfloat16 if job.train.cached_states == "bf16" else torch.float32


def processor(device: str) -> list[str]:
    """The hardware and libraries of a device on which the bits of features depend."""
    if torch.device(device).type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    if torch.device(device).type != "cpu":
        return [torch.device(device).type, platform.platform()]
    return [platform.machine(), torch.backends.cpu.get_cpu_capability()]


def cache_key(backbone: Backbone, section: BackboneSection, threads: int, **more: Any) -> str:
    """A SHA-256 over everything on which a feature's bits depend, apart from the example."""
    parts = {
        "format": FORMAT,
        "weights": backbone.fingerprint,
        "name": backbone.name,
        "preparation": _preparation_print(backbone),
        "max_tokens": section.max_tokens,
        "image_size": section.image_size,
        "pool": section.pool,
        "channels_last": section.channels_last,
        "compiler": compiler() if section.compile else None,
        "batch": BATCH,
        "threads": threads,
        "versions": [version_of(package) for package in ("torch", "torchvision", "transformers")],
        "processor": processor("cpu"),
    }
    return hashlib.sha256(json.dumps(parts | more, sort_keys=True).encode()).hexdigest()


def _preparation_print(backbone: Backbone) -> str:
    """A hash of what preprocesses inputs: an extension's code, or the files beside a backbone's weights.

    Such files are a tokenizer, a vocabulary or the mean of images.
    """
    digest = hashlib.sha256()
    if backbone.kind == "plugin":
        digest.update(json.dumps(kept_under(BACKBONES[backbone.name].loaded(), "backbone.name")).encode())
    for file in sorted(backbone.folder.iterdir()) if backbone.folder else ():
        if file.suffix in (".json", ".txt", ".model") and file.is_file():
            digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    if backbone.also is not None:
        digest.update(_preparation_print(backbone.also).encode())
    return digest.hexdigest()


def _told_from(progress: Progress, start: int, total: int, done: int, part: int) -> None:
    """Report the progress of a part as progress of the whole."""
    progress(start + done, total)
