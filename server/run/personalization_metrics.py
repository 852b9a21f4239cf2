"""What clients' own models gained over the one that all share, where they keep any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.job.job import Job
from atoll.report.text import metric_value, metric_words

Measured = Mapping[str, Mapping[str, float]]
"""Metrics by client."""


def personalization_metrics(keep: str, clients: Measured, shared: Measured) -> dict[str, Any]:
    """For `result.json`: what is kept, what the shared model does at each client, and means over clients.

    Every client that measured counts the same. Heads that are kept leave no shared model to measure.
    """
    found: dict[str, Any] = {"keep": keep, "clients": _means(clients)}
    if shared:
        found |= {"global": _means(shared), "global_clients": {name: dict(m) for name, m in shared.items()}}
    return found


def _means(measured: Measured) -> dict[str, float]:
    used = [metrics for metrics in measured.values() if metrics["examples"]]
    if not used:
        return {}
    return {name: sum(m[name] for m in used) / len(used) for name in used[0] if name != "examples"}


def with_adapted(clients: Measured, adapted: Measured) -> dict[str, dict[str, float]]:
    """Each client's metrics, and beside them what it measured after its steps, as `adapted_…`."""
    found = {}
    for name, metrics in clients.items():
        after = {f"adapted_{m}": v for m, v in adapted.get(name, {}).items() if m != "examples"}
        found[name] = {**metrics, **after}
    return found


def personalization_notes(
    job: Job, own: Mapping[str, Any] | None, clients: Measured, metric: str
) -> list[str]:
    """What a reader must know of models that are each client's own."""
    steps, means = job.evaluate.adapt, _means(clients)
    if steps is not None:
        after = f"the model after {steps} local steps at each client"
        return _compared(after, metric, means.get(f"adapted_{metric}"), "before them", means.get(metric))
    if own is None:
        return []
    notes = _compared(
        "each client's own model", metric, means.get(metric),
        "the model of all clients", own.get("global", {}).get(metric),
    )  # fmt: skip
    if own["keep"] == "head":
        notes.append("clients keep their heads: there is no model of all, what is measured is each one's own")
    if own["keep"] == "norms":
        notes.append(
            "the model on disk, and what is measured on the server, has the norms as they were at first"
        )
    return notes


def _compared(what: str, metric: str, value: float | None, other: str, beside: float | None) -> list[str]:
    if value is None or beside is None:
        return []
    apart = value - beside
    gain = f"{apart * 100:+.1f} points" if "accuracy" in metric else f"{apart:+.3f}"
    return [
        f"{what}, mean over clients: {metric_words(metric)} {metric_value(metric, value)};"
        f" {other} {metric_value(metric, beside)} (difference {gain})"
    ]
