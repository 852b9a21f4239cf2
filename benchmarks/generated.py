"""A simulated population over generated features, as if a backbone had made them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from protocol.job import Job
from sim.population import Population
from tasks.reading import example_keys


def population_of(
    features: torch.Tensor,
    targets: torch.Tensor,
    folder: Path,
    *,
    cohort: int,
    rounds: int,
    train: dict[str, Any],
) -> Population:
    """Clients with the given features [clients, examples, width] and targets [clients, examples].

    Each example is a distinct text whose feature is put into the cache beforehand, under a
    backbone that is never loaded.
    """
    clients, examples, width = features.shape
    backbone = _backbone(folder, width)
    job = Job.parse(
        {
            "name": "generated",
            "seed": 1,
            "task": {"name": "text-classification"},
            "data": {"source": "generated", "validation_fraction": 0.0},
            "backbone": {"name": str(backbone)},
            "train": train,
            "federation": {"clients": clients, "cohort": cohort, "rounds": rounds},
            "evaluate": {"every": 1_000_000},
        },
        origin="benchmark",
    )
    table = datasets.Dataset.from_dict(
        {
            "text": [f"generated {i}" for i in range(clients * examples)],
            "label": [f"{c:03d}" for c in targets.reshape(-1).tolist()],
        }
    )
    keys = example_keys(table)
    rows = np.arange(clients * examples).reshape(clients, examples).tolist()
    _fill_cache(job, keys, features.reshape(-1, width))
    return Population(job, table, table.select([]), keys, rows)


def _backbone(folder: Path, width: int) -> Path:
    """The outside of a saved encoder; its weights are never read into a network."""
    from transformers import BertConfig

    path = folder / "backbone"
    BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    (path / "model.safetensors").write_bytes(hashlib.sha256(str(width).encode()).digest())
    return path


def _fill_cache(job: Job, keys: list[bytes], features: torch.Tensor) -> None:
    from tasks import task_named
    from tasks.learner import Learner

    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    cache = learner._plain.cache
    if cache.missing(keys):
        cache.put(keys, features)
