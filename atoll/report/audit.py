"""What an attack on a run found, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.report.comparison import finite

LIMITS = "An audit can only find that a claim is false, never that it is true."


def what_the_audit_found(audit: Mapping[str, Any]) -> str:
    """A sentence or two for each unit, and what an audit can't say."""
    sentences = " ".join(
        _of_unit(unit, finding, audit["confidence"]) for unit, finding in audit["units"].items()
    )
    return sentences if audit["contradicted"] else f"{sentences} {LIMITS}"


def proven(finding: Mapping[str, Any]) -> float:
    """The larger of a unit's two lower bounds from guesses."""
    return max(float(finding["one_run"]["epsilon"]), float(finding["f_dp"]["epsilon"]))


def _of_sums(finding: Mapping[str, Any]) -> str:
    """What is proven of Gaussian noise; nothing in results that are older than that bound."""
    sums = finding.get("gaussian_sums")
    if sums is None:
        return ""
    return (
        f"; if its noise is Gaussian, at least {sums['epsilon']:.3g}, with {100 * sums['confidence']:g} %"
        " confidence"
    )


def _of_unit(unit: str, finding: Mapping[str, Any], confidence: float) -> str:
    claimed, least = finite(finding["claimed_epsilon"]), proven(finding)
    sure = f"with {100 * confidence:g} % confidence epsilon is at least {least:.3g} for one {unit}"
    sure += _of_sums(finding)
    at = f"at delta {finding['delta']:.2g}"
    if finding["contradicted"] and claimed is not None:
        return (
            f"ALARM: the attack contradicts the claim: {sure}, {at}, and {claimed:.3g} was claimed. Don't"
            " rely on this run's privacy: its noise, its clipping, its sampling or its accounting is broken."
        )
    if claimed is None:
        return f"Nothing finite was claimed to contradict: {sure}, {at}."
    return f"The attack found no contradiction: {sure}, {at}, and {claimed:.3g} was claimed."
