"""The metrics of clients' personal models, compared with those of the shared model."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.job.job import Job
from atoll.report.run_result import Personal
from atoll.report.text import metric_label, metric_value
from atoll.tasks.metric_values import MeanOverClients, MetricValues, means

Measured = Mapping[str, Mapping[str, float | None]]
"""Metrics by client."""


def personalization_metrics(keep: str, clients: Measured, shared: Measured) -> Personal:
    """For `result.json`: what clients keep, the shared model's metrics at each of them, and means over all.

    In a mean, every client at which a metric is defined has the same weight. Where clients keep their heads
    there is no shared model to measure.
    """
    table: Personal = {"keep": keep, "clients": _values(clients)}
    if shared:
        table["global"] = _values(shared)
        table["global_clients"] = {name: dict(m) for name, m in shared.items()}
    return table


def _values(measured: Measured) -> MetricValues:
    return {name: mean.value for name, mean in _means(measured).items()}


def _means(measured: Measured) -> dict[str, MeanOverClients]:
    """Each metric's mean over the clients that have a validation split."""
    used = (metrics for metrics in measured.values() if metrics["examples"])
    return means({name: value for name, value in m.items() if name != "examples"} for m in used)


def with_adapted(clients: Measured, adapted: Measured) -> dict[str, MetricValues]:
    """Each client's metrics, with those after local adaptation steps as `adapted_…`."""
    by_client = {}
    for name, metrics in clients.items():
        after = {f"adapted_{m}": v for m, v in adapted.get(name, {}).items() if m != "examples"}
        by_client[name] = {**metrics, **after}
    return by_client


def personalization_notes(job: Job, personal: Personal | None, clients: Measured, metric: str) -> list[str]:
    """Notes for the result about clients' personal models."""
    steps, means = job.evaluate.adapt, _means(clients)
    if steps is not None:
        after = f"the model after {steps} local steps at each client"
        return _compared(after, metric, means.get(f"adapted_{metric}"), "before them", means.get(metric))
    if personal is None:
        return []
    notes = _compared(
        "each client's own model", metric, means.get(metric),
        "the model of all clients", _means(personal.get("global_clients", {})).get(metric),
    )  # fmt: skip
    if personal["keep"] == "head":
        notes.append("clients keep their heads: there is no model of all, what is measured is each one's own")
    if personal["keep"] == "norms":
        notes.append(
            "the model on disk, and what is measured on the server, has the norms as they were at first"
        )
    if personal["keep"] == "lora-b":
        notes.append(
            "the model on disk, and what is measured on the server, has LoRA's B as it was at first, zero"
        )
    return notes


def _compared(
    what: str, metric: str, mean: MeanOverClients | None, other: str, beside: MeanOverClients | None
) -> list[str]:
    if mean is None or beside is None:
        return []
    if mean.value is None or beside.value is None:
        return [f"{what}: {metric_label(metric)} is undefined at all of {mean.clients} clients"]
    apart = mean.value - beside.value
    gain = f"{apart * 100:+.1f} points" if "accuracy" in metric else f"{apart:+.3f}"
    return [
        f"{what}, mean {mean.coverage or 'over clients'}: {metric_label(metric)}"
        f" {metric_value(metric, mean.value)};"
        f" {other} {metric_value(metric, beside.value)} (difference {gain})"
    ]
