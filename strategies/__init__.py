"""How updates merge into the next global model: pure functions on tensors.

The registry is read without torch: a strategy's module comes in when one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError
from atoll.job.extension_options import checked_options
from atoll.job.job import StrategySection
from atoll.plugins import BUILT_IN, Extension, Registry

if TYPE_CHECKING:
    from atoll.protocol.messages import Update
    from atoll.protocol.tensors import Tensors
    from atoll.strategies.mean import moved, weighted_mean
    from atoll.strategies.strategy import Plan, State, Strategy

__all__ = [
    "STRATEGIES", "Entry", "Plan", "State", "Strategy", "Tensors", "Update",
    "build_strategy", "check_strategy", "moved", "weighted_mean",
]  # fmt: skip

_ELSEWHERE = {
    "Plan": "atoll.strategies.strategy",
    "State": "atoll.strategies.strategy",
    "Strategy": "atoll.strategies.strategy",
    "Tensors": "atoll.protocol.tensors",
    "Update": "atoll.protocol.messages",
    "moved": "atoll.strategies.mean",
    "weighted_mean": "atoll.strategies.mean",
}
"""What a strategy is written with, and where it is: it brings torch, and is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'atoll.strategies' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


@dataclass(frozen=True)
class Entry:
    """One line of the registry: how to build it, which keys of `[strategy]` it takes, what it is, whose."""

    build: Callable[..., Strategy]
    keys: tuple[str, ...]
    summary: str
    origin: str = BUILT_IN


def _fedavg(**keys: float) -> Strategy:
    from atoll.strategies.fedavg import FedAvg

    return FedAvg(**keys)


def _fedopt(step: str, **keys: float) -> Strategy:
    from atoll.strategies import fedopt

    return fedopt.FedOpt(fedopt.STEPS[step], **keys)


def _reptile(**keys: float) -> Strategy:
    from atoll.strategies.reptile import Reptile

    return Reptile(**keys)


ADAPTIVE = ("lr", "beta1", "beta2", "tau")

BUILT_INS: dict[str, Entry] = {
    "fedavg": Entry(_fedavg, ("lr",), "mean of the deltas, weighted by examples (McMahan 2017)"),
    "fedavgm": Entry(
        partial(_fedavg, momentum=0.9), ("lr", "momentum"), "FedAvg with server momentum (Hsu 2019)"
    ),
    "fedprox": Entry(
        partial(_fedavg, proximal_mu=0.01),
        ("lr", "proximal_mu"),
        "FedAvg whose clients are held near the global model (Li 2020)",
    ),
    "fedadagrad": Entry(
        partial(_fedopt, "adagrad", beta1=0.0), ADAPTIVE, "Adagrad on the mean delta (Reddi 2021)"
    ),
    "fedadam": Entry(partial(_fedopt, "adam"), ADAPTIVE, "Adam on the mean delta (Reddi 2021)"),
    "fedyogi": Entry(partial(_fedopt, "yogi"), ADAPTIVE, "Yogi on the mean delta (Reddi 2021)"),
    "reptile": Entry(_reptile, ("lr",), "part of the way to the clients' even mean (Nichol 2018)"),
}


def _brought(extension: Extension, options: Mapping[str, Any] | None = None) -> Strategy:
    extension = extension.loaded()
    assert extension.thing is not None
    strategy: Strategy = extension.thing(*checked_options(extension, options, "strategy.options"))
    for method in ("begin", "plan", "merge"):
        if not callable(getattr(strategy, method, None)):
            raise ConfigError(
                f"strategy.name: {extension.name} ({extension.origin}) has no method {method},"
                " expected begin, plan and merge"
            )
    return strategy


def _of(extension: Extension) -> Entry:
    return Entry(partial(_brought, extension), ("options",), extension.summary, extension.origin)


STRATEGIES = Registry("strategy", BUILT_INS, _of)


def check_strategy(section: StrategySection) -> None:
    """Say what is wrong with a name, or with keys of a strategy of ours, before torch is there.

    Raises:
        ConfigError: the name is unknown, or a key has no meaning for it.
    """
    if section.name.startswith("flwr:"):
        from atoll.strategies.flower_names import check_flower_name

        check_flower_name(section.name.removeprefix("flwr:"))
        return
    STRATEGIES.check(section.name, "strategy.name", " (or flwr:NAME)")
    entry = STRATEGIES[section.name]
    for key in _given(section):
        if key not in entry.keys:
            raise ConfigError(
                f"strategy.{key}: {section.name} does not use it, expected only {', '.join(entry.keys)}"
            )


def build_strategy(section: StrategySection) -> Strategy:
    """The strategy a job names, `flwr:NAME` for one of Flower's own.

    Raises:
        ConfigError: the name is unknown, or a key has no meaning for it.
    """
    check_strategy(section)
    if section.name.startswith("flwr:"):
        from atoll.strategies.flower import FlowerStrategy

        return FlowerStrategy.named(section.name.removeprefix("flwr:"), _given(section))
    return STRATEGIES[section.name].build(**_given(section))


def _given(section: StrategySection) -> dict[str, Any]:
    return {k: v for k, v in section.model_dump().items() if k != "name" and v is not None}
