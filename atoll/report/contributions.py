"""The report's section on contributions: what each client's updates did for the model."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.report.run_result import ClientContribution, Contributions
from atoll.report.text import metric_label, pluralize

BEST, WORST = 100, 20
"""Clients that the table shows of each end, where there are more than both."""


@dataclass(frozen=True)
class ContributionsSection:
    """A sentence on what is measured, and (client, rounds, contribution) of each, the largest first."""

    reading: str
    shown: tuple[tuple[str, str, str], ...]
    left_out: str
    last: tuple[tuple[str, str, str], ...]


def contributions_section(contributions: Contributions | None) -> ContributionsSection | None:
    """The clients by what they contributed; None where the job doesn't ask for it."""
    if contributions is None:
        return None
    ranked = sorted(contributions["clients"].items(), key=_rank)
    rows = [(name, f"{one['rounds']:,}", _value(one)) for name, one in ranked]
    more = len(rows) - BEST - WORST
    return ContributionsSection(
        reading=_reading(contributions),
        shown=tuple(rows[:BEST] if more > 0 else rows),
        left_out=f"{pluralize(more, 'client')} between" if more > 0 else "",
        last=tuple(rows[-WORST:]) if more > 0 else (),
    )


def _rank(client: tuple[str, ClientContribution]) -> tuple[bool, float, str]:
    """Sorts the largest to the front, and what is undefined to the end."""
    name, one = client
    return one["value"] is None, -(one["value"] or 0.0), name


def _value(one: ClientContribution) -> str:
    if one["value"] is None:
        return "undefined" if one["rounds"] else "undefined: never took part"
    missing = f" (undefined in {pluralize(one['undefined'], 'round')})" if one["undefined"] else ""
    return f"{one['value']:+.4f}{missing}"


def _reading(contributions: Contributions) -> str:
    how = {
        "leave-one-out": "the model of all of a round's updates minus the one without the client's",
        "shapley": "Shapley's value of the client's update among those of its round",
    }[contributions["method"]]
    word = metric_label(contributions["metric"])
    sign = ", which counts negatively, for less is better" if contributions["lower_is_better"] else ""
    return f"What each client added to the {word} on the server's test set{sign}, summed over rounds: {how}."
