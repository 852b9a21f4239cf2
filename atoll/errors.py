"""The one tree of errors that a user can cause or meet, and what was probably meant."""

from __future__ import annotations

import difflib
import re
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

    def __init__(self) -> None:
        super().__init__("its data changed during the run; the next run takes it as it is then")


class WeightsError(InputError):
    """A backbone's weights are missing or damaged; the message says where they were looked for."""


class BudgetExhausted(JobError):
    """The next release would spend more privacy than was allowed."""


class InconsistentUpdates(JobError):
    """Too few usable updates arrived to close a round."""


SYNONYMS = {
    "learning_rate": "lr", "learnrate": "lr", "eta": "lr", "server_lr": "lr", "bs": "batch_size",
    "batch": "batch_size", "local_epochs": "epochs", "num_epochs": "epochs", "wd": "weight_decay",
    "optim": "optimizer", "lora_rank": "rank", "r": "rank", "lora_alpha": "alpha", "num_rounds": "rounds",
    "num_server_rounds": "rounds", "num_clients": "clients", "clients_per_round": "cohort", "eps": "epsilon",
    "target_epsilon": "epsilon", "max_grad_norm": "clipping_norm", "sigma": "noise_multiplier",
    "mu": "proximal_mu", "max_length": "max_tokens", "max_seq_length": "max_tokens", "model": "name",
    "labels": "classes", "freeze": "method", "ner": "token-classification",
    "clip": "clip_norm", "grad_clip": "clip_norm", "gradient_clipping": "clip_norm",
    "clip_grad_norm": "clip_norm", "gradient_clip_val": "clip_norm", "warmup": "lr_warmup",
    "warmup_rounds": "lr_warmup", "gradient_accumulation_steps": "accumulate",
}  # fmt: skip
"""What others call a key or a name, with words joined by "_"; used where there is one of that name."""
ALIKE = 0.7
"""How alike each word must be in two names of which one is suggested for the other, from 0 to 1."""


def did_you_mean(
    name: str, known: Iterable[str], *, cutoff: float = 0.6, otherwise: str | None = None
) -> str:
    """The end of a line about an unknown name: the known one that must be meant, or else all of them.

    That is a synonym, or one that is spelt nearly so, word by word. `cutoff` is how alike the whole names
    must be, from 0 to 1; `otherwise` is said where none is meant.

    >>> did_you_mean("fedavgg", ["fedavg", "fedadam"]), did_you_mean("x", ["fedavg", "fedadam"])
    ("did you mean 'fedavg'?", 'expected one of fedavg, fedadam')
    >>> did_you_mean("learning-rate", ["lr", "epochs"])
    "did you mean 'lr'?"
    """
    names = list(known)
    meant = SYNONYMS.get("_".join(_name_parts(name)))
    if meant in names:
        return f"did you mean {meant!r}?"
    near = difflib.get_close_matches(name, names, n=3, cutoff=cutoff)
    for other in near:
        if _spelt_alike(name, other):
            return f"did you mean {other!r}?"
    return otherwise or f"expected one of {', '.join(names)}"


def _name_parts(name: str) -> list[str]:
    return re.split("[-_.: ]+", name.lower().lstrip("-"))


def _spelt_alike(name: str, other: str) -> bool:
    """Whether two names are the same but for slips: `token-...` and `text-...` are two things."""
    mine, theirs = _name_parts(name), _name_parts(other)
    if len(mine) != len(theirs):
        mine, theirs = ["".join(mine)], ["".join(theirs)]
    pairs = zip(mine, theirs, strict=True)
    return all(difflib.SequenceMatcher(None, *pair).ratio() >= ALIKE for pair in pairs)
