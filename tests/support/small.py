"""Small real things that several tests build on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.data.shard import Shard
from atoll.datasets.synthetic.png import grey_png
from atoll.job.job import Job


class Believing:
    """A site's identity that signs nothing and believes everything: where signatures aren't looked at."""

    def knows(self, client: str) -> bool:
        return True

    def sign(self, content: bytes) -> bytes:
        return b""

    def has_signed(self, client: str, content: bytes, signature: bytes) -> bool:
        return True


def believing() -> SecureAggregationSession:
    """The secure sums of a site with such an identity."""
    return SecureAggregationSession(identity=Believing())


def image_job(backbone: str, /, **tables: object) -> Job:
    """An image job on a random torchvision network at 32 pixels."""
    table: dict[str, object] = {
        "name": "small",
        "seed": 5,
        "task": {"name": "image-classification"},
        "data": {"source": "digits"},
        "backbone": {"name": f"torchvision:{backbone}", "weights": "random", "image_size": 32},
        "train": {"lr": 0.01, "batch_size": 5},
        "federation": {"clients": 4, "rounds": 2},
    }
    if backbone == "vit_b_16":
        table["backbone"] = {"name": "torchvision:vit_b_16", "weights": "random", "image_size": 224}
    return Job.parse(table | tables, origin="test")


def grey_png_shard(count: int, *, classes: int, seed: int = 0) -> Shard:
    """Images whose brightness tells their class."""
    rng = np.random.default_rng(seed)
    targets = [i % classes for i in range(count)]
    pixels = [rng.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(60 * t) for t in targets]
    images = [grey_png(p) for p in pixels]
    return Shard(images, torch.tensor(targets), tuple(hashlib.sha256(i).digest() for i in images))


@cache
def _folder(count: int, classes: int) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="few-pictures-")
    shard = grey_png_shard(count, classes=classes)
    for number, (image, target) in enumerate(zip(shard.inputs, shard.targets.tolist(), strict=True)):
        place = Path(folder.name, str(target), f"{number}.png")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(image)
    return folder


def few_pictures(count: int = 90, *, classes: int = 3) -> dict[str, object]:
    """A job's `[data]` with the same images as files, on which whole networks take little time.

    They are written once, and go when the tests are over.
    """
    return {"source": _folder(count, classes).name, "partition": {"kind": "iid"}}
