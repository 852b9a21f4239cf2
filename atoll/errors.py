"""The one tree of errors that a user can cause or meet, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JobError(Exception):
    """A run cannot go on; its message is the one line the user reads."""

    exit_code = 1


class InputError(JobError):
    """What the user gave is wrong: nothing was run."""

    exit_code = 2


class ConfigError(InputError):
    """A job, a kit or a command-line value is wrong; the message names the key."""


class DataError(InputError):
    """A shard or a source is wrong; the message names the file or column."""


class DataChanged(DataError):
    """A shard is no longer what it was when the run began."""


class WeightsError(InputError):
    """A backbone's weights are missing or damaged; the message says where they were looked for."""


class BudgetExhausted(JobError):
    """The next release would spend more privacy than was allowed."""


class InconsistentUpdates(JobError):
    """Too few usable updates arrived to close a round."""


def did_you_mean(
    name: str, known: Iterable[str], *, cutoff: float = 0.6, otherwise: str | None = None
) -> str:
    """The end of a line about an unknown name: the nearest known one, or else all of them.

    `cutoff` is how alike two names must be, from 0 to 1; `otherwise` is said where none is.

    >>> did_you_mean("fedavgg", ["fedavg", "fedadam"]), did_you_mean("x", ["fedavg", "fedadam"])
    ("did you mean 'fedavg'?", 'expected one of fedavg, fedadam')
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if near:
        return f"did you mean {near[0]!r}?"
    return otherwise or f"expected one of {', '.join(names)}"
