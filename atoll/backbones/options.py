"""The options of a task or a network: free keys of the job, checked by whoever knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from pydantic import ValidationError, model_validator

from atoll.backbones.brought.augmentations import check_draws
from atoll.backbones.brought.names import AUGMENTATIONS, brought_augmentations, is_brought
from atoll.errors import ConfigError, did_you_mean
from atoll.job.error_text import explain
from atoll.job.extension_options import checked_options
from atoll.job.job import Job
from atoll.job.section import Count, Decay, Section

HIDES = {"texts": "a tokenizer's tokens", "sounds": "parts of a spectrum of Atoll's own"}
"""What Atoll's own augmentations hide of inputs that an extension's backbone prepares itself."""

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


def options_of(options: Mapping[str, Any], known: type[Known], where: str = "task.options") -> Known:
    """The options, with defaults where they are not given.

    Raises:
        ConfigError: a key is unknown, or its value doesn't fit.
    """
    try:
        return known.model_validate_json(json.dumps(options))
    except ValidationError as error:
        raise ConfigError(explain(error, known, where)) from None


def refuse_options(options: Mapping[str, Any], where: str, whose: str) -> None:
    """Raises ConfigError if there are any, of a task or a network that has none."""
    if options:
        raise ConfigError(f"{where}.{next(iter(options))}: {whose} has no options, expected none")


def check_backbone_options(job: Job) -> None:
    """Raises ConfigError unless the backbone's options are those of an extension's, if it is one: or none.

    Nothing but the extension's module is imported for it.
    """
    if not is_brought(job.backbone):
        refuse_options(job.backbone.options, "backbone.options", f"a backbone of {job.task.name}")
        return
    from atoll.backbones.brought.loading import extension_of  # which brings torch

    checked_options(extension_of(job.backbone.name), job.backbone.options, "backbone.options")


def check_augment(job: Job, known: Sequence[str]) -> None:
    """See whether inputs vary only in ways that the task knows, or that extensions bring for its inputs.

    `known` are Atoll's own of the task.

    Raises:
        ConfigError: a name is another, or an extension's doesn't draw from its generator alone.
    """
    of = AUGMENTATIONS[known[0]].of
    for name in job.train.augment:
        if name not in known and (name not in AUGMENTATIONS or AUGMENTATIONS[name].of != of):
            fitting = [
                *known,
                *(one for one in AUGMENTATIONS if AUGMENTATIONS[one].of == of and one not in known),
            ]
            names, near = ", ".join(map(repr, fitting)), did_you_mean(name, fitting, otherwise="-")
            hint = "" if near == "-" else f"; {near}"
            raise ConfigError(f"train.augment: expected {names} for {job.task.name}, found {name!r}{hint}")
        if name in known and of in HIDES and is_brought(job.backbone):
            raise ConfigError(
                f"train.augment: {name} hides {HIDES[of]}, and {job.backbone.name} has none;"
                " expected an extension's"
            )
    for name in job.train.augment_options:
        if name not in job.train.augment or AUGMENTATIONS.has(name):
            why = "has no options" if name in job.train.augment else "is not in train.augment"
            raise ConfigError(f"train.augment_options.{name}: {name} {why}, expected none")
    for extension in brought_augmentations(job):
        check_draws(extension)


def refuse_augment(job: Job) -> None:
    """Raises ConfigError if inputs are to vary, of a task that has no way to."""
    if job.train.augment:
        raise ConfigError(f"train.augment: {job.task.name} has no augmentations, expected none")
