"""A small job for every task that isn't plain classification: real data or generated, random weights."""

from __future__ import annotations

from typing import Any

from protocol.job import Job

COMMON: dict[str, Any] = {
    "seed": 11,
    "federation": {"clients": 2, "rounds": 2},
    "train": {"lr": 0.01, "batch_size": 16, "optimizer": "adam"},
}

TABLES: dict[str, dict[str, Any]] = {
    "forecasting": {
        "task": {
            "name": "forecasting",
            "options": {
                "history": 14,
                "horizon": 3,
                "stride": 60,
                "known": ("rain",),
                "observed": ("traffic",),
            },
        },
        "data": {"source": "generated-deliveries"},
        "backbone": {"name": "atoll:gru", "weights": "random", "options": {"width": 8, "layers": 2}},
    },
    "recommendation": {
        "task": {"name": "recommendation", "options": {"length": 8}},
        "data": {"source": "generated-shop"},
        "backbone": {"name": "atoll:sasrec", "weights": "random", "options": {"width": 8, "heads": 2}},
        "train": {"lr": 0.01, "batch_size": 128, "optimizer": "adam"},
    },
    "image-text": {
        "task": {"name": "image-text"},
        "data": {"source": "generated-reviews", "test_fraction": 0.0},
        "backbone": {
            "name": "torchvision:squeezenet1_1",
            "weights": "random",
            "image_size": 32,
            "max_tokens": 16,
        },
        "train": {"lr": 0.001, "batch_size": 64, "optimizer": "adam"},
    },
}
"""Those whose networks need no folder; tests put one in where a task needs it."""


def job_of(task: str, method: str, **more: Any) -> Job:
    """The small job of a task with one way of tuning."""
    tune: dict[str, Any] = {"method": method} | ({"layers": 1} if method == "last-k" else {})
    tune |= {"rank": 2} if method == "lora" else {}
    table = COMMON | TABLES[task] | {"name": f"{task}-{method}", "tune": tune}
    return Job.parse(table | more, origin="test")
