"""A simulated population over generated features, as if a backbone had made them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from atoll.data.classification import example_keys
from atoll.data.dataset import Dataset
from atoll.job.job import Job
from atoll.sim.population.assignment import FixedAssignment
from atoll.sim.population.population import Population
from benchmarks.workload import Workload


def population_of(workload: Workload, folder: Path) -> Population:
    """The workload's clients, whose inputs are features.

    Each example is a distinct text whose feature is put into the cache beforehand, under a
    backbone that is never loaded.
    """
    features = torch.from_numpy(workload.inputs)
    backbone = _backbone(folder, features.shape[1])
    job = Job.parse(
        {
            "name": "generated",
            "seed": 1,
            "task": {"name": "text-classification"},
            "data": {"source": "generated", "validation_fraction": 0.0},
            "backbone": {"name": str(backbone)},
            "train": {"batch_size": workload.batch, "lr": workload.lr},
            "federation": {
                "clients": workload.clients,
                "cohort": workload.cohort,
                "rounds": workload.rounds,
            },
            "evaluate": {"every": 1_000_000},
        },
        origin="benchmark",
    )
    columns = {
        "text": [f"generated {i}" for i in range(len(features))],
        "label": [f"{c:03d}" for c in workload.targets.tolist()],
    }
    table = Dataset(pa.table(columns))
    keys = example_keys(table)
    _fill_cache(job, keys, features)
    dealt = FixedAssignment(np.arange(len(features)), np.asarray(workload.starts))
    return Population(job, table, table.select([]), keys, dealt)


def _backbone(folder: Path, width: int) -> Path:
    """The outside of a saved encoder; its weights are never read into a network."""
    from transformers import BertConfig

    path = folder / "backbone"
    BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    (path / "model.safetensors").write_bytes(hashlib.sha256(str(width).encode()).digest())
    return path


def _fill_cache(job: Job, keys: list[bytes], features: torch.Tensor) -> None:
    from atoll.learning.learner import Learner
    from atoll.tasks import task_named

    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    learner.features.put(keys, features)
