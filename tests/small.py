"""Small real things that several tests build on."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from protocol.job import Job
from tasks.png import grey_png
from tasks.seam import Shard


def image_job(backbone: str, **tables: object) -> Job:
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
