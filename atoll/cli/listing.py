"""What `atoll list` can list."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

Lines = list[tuple[str, str]]


def tasks() -> Lines:
    from atoll.tasks import TASKS

    return [(name, entry.summary) for name, entry in TASKS.items()]


def backbones() -> Lines:
    from atoll.backbones.resolve import OWN, PACKAGED, RAW
    from atoll.backbones.torchvision_models import TorchvisionKind, torchvision_names

    packaged = [
        (name, f"pretrained weights from package {package}") for name, (package, _) in PACKAGED.items()
    ]
    open_ended = [
        ("hf:NAME", "any transformers encoder, from its cache or the hub"),
        ("FOLDER", "any folder written by save_pretrained"),
        (RAW, "no network: an image's pixels, scaled to length 1; head only"),
    ]
    own = [(f"atoll:{name}", f"built by Atoll, for {what}") for name, what in OWN.items()]
    vision = [
        (f"torchvision:{n}", "torchvision") for n in torchvision_names() if f"torchvision:{n}" not in PACKAGED
    ]
    dense = [
        (f"torchvision:{name}", f"torchvision, for {kind}")
        for kind in get_args(TorchvisionKind)[1:]
        for name in torchvision_names(kind)
    ]
    return packaged + open_ended + own + vision + dense


def strategies() -> Lines:
    from atoll.strategies import STRATEGIES
    from atoll.strategies.flower_names import flower_names

    ours = [(name, f"{entry.summary}; keys: {', '.join(entry.keys)}") for name, entry in STRATEGIES.items()]
    return ours + [(f"flwr:{name}", "Flower's own") for name in flower_names()]


def partitions() -> Lines:
    return [
        ("iid", 'every client alike: { kind = "iid" }'),
        ("dirichlet", 'label skew: { kind = "dirichlet", alpha = 0.3 }'),
        ("pathological", 'few classes a client: { kind = "pathological", classes_per_client = 2 }'),
        ("natural", 'one client a value of a column: { kind = "natural", by = "hospital" }'),
        ("resampled", 'each client draws its own, any number of them: { kind = "resampled", examples = 50 }'),
    ]


def sources() -> Lines:
    from atoll.datasets.registry import SOURCES

    return [(name, f"{source.description} ({source.licence})") for name, source in SOURCES.items()]


CATALOGUE: dict[str, Callable[[], Lines]] = {
    "tasks": tasks,
    "backbones": backbones,
    "strategies": strategies,
    "partitions": partitions,
    "sources": sources,
}
