"""The options of a task or a network: free keys of the job, checked by whoever knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from pydantic import ValidationError, model_validator

from atoll.errors import ConfigError
from atoll.job.error_text import explain
from atoll.job.job import Job
from atoll.job.section import Count, Decay, Section

Known = TypeVar("Known", bound=Section)


class RecurrentLayers(Section):
    """Options of layers that read a sequence each; what goes from one to the next may drop out."""

    layers: Count = 1
    dropout: Decay = 0.0

    @model_validator(mode="after")
    def _dropout_is_between_layers(self) -> Self:
        if self.dropout and self.layers == 1:
            raise ValueError(
                f"dropout: it is between layers, expected layers of 2 or more, found {self.layers}"
            )
        return self


def options_of(given: Mapping[str, Any], known: type[Known], where: str = "task.options") -> Known:
    """The options, with defaults where they are not given.

    Raises:
        ConfigError: a key is unknown, or its value doesn't fit.
    """
    try:
        return known.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise ConfigError(explain(error, known, where)) from None


def refuse_options(given: Mapping[str, Any], where: str, whose: str) -> None:
    """Raises ConfigError if there are any, of a task or a network that has none."""
    if given:
        raise ConfigError(f"{where}.{next(iter(given))}: {whose} has no options, expected none")


def check_augment(job: Job, known: Sequence[str]) -> None:
    """Raises ConfigError if inputs are to vary in a way that the task doesn't know."""
    for name in job.train.augment:
        if name not in known:
            names = ", ".join(map(repr, known))
            raise ConfigError(f"train.augment: expected {names} for {job.task.name}, found {name!r}")


def refuse_augment(job: Job) -> None:
    """Raises ConfigError if inputs are to vary, of a task that has no way to."""
    if job.train.augment:
        raise ConfigError(f"train.augment: {job.task.name} has no augmentations, expected none")
