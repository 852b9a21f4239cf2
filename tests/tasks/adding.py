"""Metrics as a run computes them: states are made at clients, added at the server, and read there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric, MetricCollection

CLIENTS = 5


def states(metric: Metric) -> dict[str, torch.Tensor]:
    """Its states, all of which must be tensors that are summed."""
    for name, reduction in metric._reductions.items():
        assert isinstance(metric._defaults[name], torch.Tensor), f"{name} is a list"
        assert getattr(reduction, "__name__", "") == "dim_zero_sum", f"{name} isn't summed"
    return {name: getattr(metric, name).clone() for name in metric._defaults}


def value_of(make: Callable[[], Metric], *parts: tuple[Any, ...]) -> float:
    """What the server computes from the added states of clients that each update with one part."""
    total: dict[str, torch.Tensor] = {}
    for arguments in parts:
        client = make()
        client.update(*arguments)
        for name, state in states(client).items():
            total[name] = total[name] + state if name in total else state
            assert total[name].shape == client._defaults[name].shape
    server = MetricCollection({"it": make()}, compute_groups=False)
    for name, state in total.items():
        setattr(server["it"], name, state)
    server["it"]._update_count = 1
    return float(server.compute()["it"])


def split(arguments: tuple[Any, ...], seed: int) -> list[tuple[Any, ...]]:
    """The examples of these arguments dealt at random to clients; each keeps its examples in order."""
    owner = np.random.default_rng(seed).integers(0, CLIENTS, len(arguments[0]))
    rows = [np.flatnonzero(owner == client).tolist() for client in range(CLIENTS)]
    return [tuple(pick(values, own) for values in arguments) for own in rows]


def pick(values: Any, rows: Sequence[int]) -> Any:
    return values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
