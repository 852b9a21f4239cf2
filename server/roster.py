"""The clients that take part in a run, and those that do not, with their reasons."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.diagnostics import Counts, counts_from_json, total
from atoll.data.labels import alike
from atoll.errors import ConfigError, did_you_mean
from atoll.job.job import Job
from atoll.protocol.messages import DataInfo, Hello
from atoll.strategies.options import trusted_client
from atoll.tasks.data_info import is_silent

logger = logging.getLogger(__name__)

CLASS_FIELDS = ("classes", "intents")
"""The fields of a greeting that may list classes."""

SHOWN_CLASSES = 5
"""How many classes a remark names at most."""

MOST_CLIENTS = 10_000
"""The largest number of clients for which a result lists the data of each."""


@dataclass(frozen=True)
class ClientRoster:
    """The clients of a run in the order of their names; `sizes` [clients] is how many examples each reports.

    A size of 0 means that the client does not report it, as under a promise of privacy or a secure sum.
    So that a million simulated clients fit into memory, `names` may be a sequence that computes each name on
    access, and `data_info` holds only entries that differ. `refused` has a reason for each client that does
    not take part.
    """

    names: Sequence[str]
    sizes: NDArray[np.int64]
    data_info: Sequence[DataInfo]
    refused: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Sequence[Counts]] = field(default_factory=dict)
    """How much of its data each client uses, by name, for the clients that report it."""

    @classmethod
    def of(cls, hellos: Sequence[Hello]) -> ClientRoster:
        """The roster of clients that each sent a greeting."""
        taking = sorted((h for h in hellos if not h.refusal), key=lambda h: h.client)
        return cls(
            names=tuple(h.client for h in taking),
            sizes=np.array([h.num_examples for h in taking], dtype=np.int64),
            data_info=[h.data_info for h in taking],
            counts={h.client: counts_from_json(h.counts) for h in taking if h.counts},
            refused={h.client: h.refusal for h in hellos if h.refusal},
        )

    @property
    def sizes_description(self) -> str:
        """`719 to 719 examples each`, or that sizes are not reported."""
        if not self.sizes.any():
            return "how many examples each has is not told"
        return f"{self.sizes.min()} to {self.sizes.max()} examples each"

    def used_data(self, job: Job, whole: Sequence[Counts]) -> dict[str, Any] | None:
        """For `result.json`: how much data is used, in total and by client; None where that is private.

        `whole` are the counts of a simulation's source, before it is divided among clients.
        """
        if is_silent(job):
            return None
        counts = whole or total(one for counts in self.counts.values() for one in counts)
        lists_clients = len(self.names) <= MOST_CLIENTS
        return {
            "counts": [one.as_json for one in counts],
            "clients": {name: self._used_by(place) for place, name in enumerate(self.names)}
            if lists_clients
            else None,
        }

    def _used_by(self, place: int) -> dict[str, Any]:
        counts = self.counts.get(self.names[place], ())
        listed = {"counts": [one.as_json for one in counts]} if counts else {}
        return {"examples": int(self.sizes[place]) or None, **listed}

    def check(self, job: Job) -> None:
        """Log each refusal, the counts of the data, and remarks about it.

        Raises:
            ConfigError: fewer clients take part than a round needs, or the client that the strategy trusts
                does not.
        """
        needed = job.federation.cohort or 1
        if len(self.names) < needed:
            greeted = len(self.names) + len(self.refused)
            raise ConfigError(
                f"{len(self.names)} of {greeted} clients take part, a round needs {needed}{self._reasons()}"
            )
        self._check_trusted(trusted_client(job))
        for client, reason in self.refused.items():
            logger.warning("%s does not take part: %s", client, reason)
        for one in total(one for counts in self.counts.values() for one in counts):
            logger.info("data: %s", one.description)
        for remark in self.remarks:
            logger.warning("%s", remark)

    def _check_trusted(self, root: str | None) -> None:
        if root is None or root in self.names:
            return
        if root in self.refused:
            raise ConfigError(f"strategy.options.root: {root} does not take part: {self.refused[root]}")
        raise ConfigError(
            f"strategy.options.root: there is no client {root!r}, {did_you_mean(root, self.names)}"
        )

    @property
    def remarks(self) -> list[str]:
        """Warnings about the classes that clients report; none where the job lists the classes."""
        reported = [info[key] for info in self.data_info for key in CLASS_FIELDS if key in info]
        if not reported or any(info.get("pinned") for info in self.data_info):
            return []
        remarks = [f"classes {spellings} differ by case or space only" for spellings in alike(reported)]
        if len(reported) < 2 or len(reported) != len(self.names):
            return remarks
        alone = [f"{name!r} ({self.names[site]})" for name, site in _of_one_site(reported)]
        more = f" and {len(alone) - SHOWN_CLASSES} more" if len(alone) > SHOWN_CLASSES else ""
        if alone:
            remarks.append(f"classes that one site alone has: {', '.join(alone[:SHOWN_CLASSES])}{more}")
        return remarks

    def _reasons(self) -> str:
        """The reasons of refusals, as text: up to three different ones, each with the first client's name."""
        first: dict[str, str] = {}
        for client, reason in self.refused.items():
            first.setdefault(reason, client)
        reasons = [f"{client}: {reason}" for reason, client in list(first.items())[:3]]
        more = [f"and {len(first) - 3} other reasons"] if len(first) > 3 else []
        return f" ({'; '.join(reasons + more)})" if reasons else ""


def _of_one_site(classes_by_site: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """(class, index of its site) of each class that only one site has, by class name.

    >>> _of_one_site([["a", "b"], ["a", "c"]])
    [('b', 0), ('c', 1)]
    """
    sites: dict[str, list[int]] = {}
    for site, names in enumerate(classes_by_site):
        for name in names:
            sites.setdefault(name, []).append(site)
    return sorted((name, where[0]) for name, where in sites.items() if len(where) == 1)
