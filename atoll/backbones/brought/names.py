"""The registries of backbones and augmentations: their names, and what identifies an extension's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from atoll.errors import ConfigError, did_you_mean
from atoll.job.extension_options import checked_options
from atoll.job.job import BackboneSection, Job
from atoll.kit.extensions import hashes_of
from atoll.plugins import BACKBONE_PREFIX, BUILT_IN, Extension, Registry

IMAGE_AUGMENTATIONS = ("crop", "rotate", "flip", "color")
"""In the order in which they are applied, whatever the order in the job."""
TEXT_AUGMENTATIONS = ("token-dropout",)
SPEC_AUGMENT = "spec-augment"
SOUND_AUGMENTATIONS = (SPEC_AUGMENT,)


@dataclass(frozen=True)
class Augmentation:
    """One line of the registry: what an augmentation does, and of what kind of input."""

    summary: str
    of: str
    """images, texts or sounds."""
    origin: str = BUILT_IN
    extension: Extension | None = None


def _of(extension: Extension) -> Augmentation:
    return Augmentation(extension.summary, extension.of, extension.origin, extension)


AUGMENTATIONS = Registry(
    "augmentation",
    {
        "crop": Augmentation("a part of the image, resized", "images"),
        "rotate": Augmentation("by up to 15 degrees", "images"),
        "flip": Augmentation("left to right, every second time", "images"),
        "color": Augmentation("brightness, contrast, saturation and hue", "images"),
        "token-dropout": Augmentation("a tenth of the tokens hidden", "texts"),
        SPEC_AUGMENT: Augmentation("bands and frames of a spectrum hidden (Park 2019)", "sounds"),
    },
    _of,
)


def _as_it_is(extension: Extension) -> Extension:
    return extension


BACKBONES: Registry[Extension] = Registry("backbone", {}, _as_it_is)
"""Backbones that extensions bring, by their names without `plugin:`."""


def is_brought(section: BackboneSection) -> bool:
    """Whether the job names a backbone of an extension."""
    return section.name.startswith(BACKBONE_PREFIX)


def brought_augmentations(job: Job) -> tuple[Extension, ...]:
    """Those of the job's augmentations that extensions bring, in its order, each called with its options.

    Raises:
        ConfigError: options aren't those that its model declares.
    """
    extensions = (AUGMENTATIONS[name].extension for name in job.train.augment if not AUGMENTATIONS.has(name))
    return tuple(_with_options(extension.loaded(), job) for extension in extensions if extension is not None)


def _with_options(extension: Extension, job: Job) -> Extension:
    """The augmentation as a function of an example and a generator alone."""
    name, augment = extension.name, extension.thing
    assert augment is not None
    options = checked_options(extension, job.train.augment_options.get(name), f"train.augment_options.{name}")
    return replace(extension, thing=lambda example, draw: augment(example, draw, *options))


def check_brought_backbone(name: str) -> None:
    """Raises ConfigError, in one line with the nearest name, if no extension brings that backbone."""
    short = name.removeprefix(BACKBONE_PREFIX)
    if short in BACKBONES:
        return
    known = [f"{BACKBONE_PREFIX}{one}" for one in BACKBONES]
    hint = did_you_mean(name, known) if known else "and no extension brings one"
    raise ConfigError(f"backbone.name: unknown backbone {name!r}, {hint}")


def options_for(extension: Extension, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `backbone.options` that are the extension's: `text` may name a second backbone instead."""
    known = set(extension.options.model_fields) if extension.options is not None else set()
    return {key: value for key, value in options.items() if key != "text" or key in known}


def identity(extension: Extension, key: str) -> str:
    """What tells an extension's code from any other: the same text on every machine that has the same code.

    `key` is the job's key that names it, for the error.

    Raises:
        ConfigError: it comes from a notebook's cell, say, whose code no file holds.
    """
    distribution = None if extension.entry is None else extension.entry.dist
    if distribution is not None:
        return json.dumps(hashes_of(distribution), sort_keys=True)
    if extension.code is None:
        raise ConfigError(
            f"{key}: {extension.kind} {extension.name!r} ({extension.origin}) is in no file whose hash could"
            " tell it from its next version; expected one from a Python file or a package"
        )
    return extension.code.sha256


def kept_under(extension: Extension, key: str) -> list[str]:
    """What the results of an extension's code are kept under: its identity, and what it imports besides.

    Raises:
        ConfigError: as `identity`.
    """
    code = extension.code
    return [identity(extension, key), *((code.sha256, *code.uses) if code is not None else ())]


def augmentations_kept_under(job: Job) -> dict[str, Any]:
    """What views of a job's inputs are kept under besides the names of their augmentations.

    Raises:
        ConfigError: as `identity`.
    """
    keys = [kept_under(one, "train.cached_views") for one in brought_augmentations(job)]
    options = {"augment_options": job.train.augment_options} if job.train.augment_options else {}
    return {"augmentation_code": keys, **options} if keys else {}
