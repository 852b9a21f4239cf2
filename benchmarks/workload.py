"""What is trained, as one safetensors file that every system reads: clients, a test set, settings.

Nothing here needs more than numpy and safetensors, so that it runs in every peer's environment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]

Outcome = tuple[list[float], float]
"""(seconds of every round, accuracy on the test set at the end)."""

_ARRAYS = ("inputs", "targets", "sizes", "test_inputs", "test_targets")


@dataclass(frozen=True)
class Workload:
    """Clients' examples one client after the other, and how they are trained: FedAvg by examples, SGD."""

    network: str
    inputs: Array
    targets: Array
    sizes: Array
    test_inputs: Array
    test_targets: Array
    cohort: int
    batch: int
    lr: float
    rounds: int

    @property
    def clients(self) -> int:
        return len(self.sizes)

    @property
    def classes(self) -> int:
        return int(self.test_targets.max()) + 1

    @cached_property
    def starts(self) -> Array:
        """Where each client's examples begin."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def client(self, place: int) -> tuple[Array, Array]:
        """One client's inputs and targets."""
        rows = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return self.inputs[rows], self.targets[rows]

    def save(self, path: Path) -> None:
        settings = {k: getattr(self, k) for k in ("network", "cohort", "batch", "lr", "rounds")}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, path, metadata={"settings": json.dumps(settings)})

    @classmethod
    def load(cls, path: Path) -> Workload:
        with safe_open(path, framework="numpy") as file:
            settings = json.loads(file.metadata()["settings"])
            return cls(**{name: file.get_tensor(name) for name in _ARRAYS}, **settings)


def seconds_between(stamps: list[float]) -> list[float]:
    """Seconds of every round, from when each began and the last ended."""
    return [end - begin for begin, end in pairwise(stamps)]
