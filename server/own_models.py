"""What clients' own models gained over the one that all share, where they keep any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.report_words import metric_value, metric_words

Measured = Mapping[str, Mapping[str, float]]
"""Metrics by client."""


def own_models(keep: str, clients: Measured, shared: Measured) -> dict[str, Any]:
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


def own_notes(own: Mapping[str, Any] | None, metric: str) -> list[str]:
    """What a reader must know of models that are each client's own."""
    if own is None:
        return []
    ends = "clients keep their heads, so there is no model of all clients: what is measured is each one's own"
    notes = [ends] if own["keep"] == "head" else []
    alone, shared = own["clients"].get(metric), own.get("global", {}).get(metric)
    if alone is not None and shared is not None:
        apart = alone - shared
        gain = f"{apart * 100:+.1f} points" if "accuracy" in metric else f"{apart:+.3f}"
        notes.append(
            f"each client's own model, mean over clients: {metric_words(metric)} {metric_value(metric, alone)};"
            f" the model of all clients {metric_value(metric, shared)} (difference {gain})"
        )
    if own["keep"] == "norms":
        notes.append(
            "the model on disk, and what is measured on the server, has the norms as they were at first"
        )
    return notes
