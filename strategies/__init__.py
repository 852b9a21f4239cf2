"""How updates merge into the next global model: pure functions on tensors."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from protocol.errors import ConfigError
from protocol.job import StrategySection
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt, adagrad, adam, yogi
from strategies.reptile import Reptile
from strategies.seam import Plan, State, Strategy

__all__ = ["STRATEGIES", "Plan", "State", "Strategy", "build_strategy"]


@dataclass(frozen=True)
class Entry:
    """One line of the registry: how to build it, which keys of `[strategy]` it takes, what it is."""

    build: Callable[..., Strategy]
    keys: tuple[str, ...]
    summary: str


ADAPTIVE = ("lr", "beta1", "beta2", "tau")

STRATEGIES: dict[str, Entry] = {
    "fedavg": Entry(FedAvg, ("lr",), "mean of the deltas, weighted by examples (McMahan 2017)"),
    "fedavgm": Entry(
        partial(FedAvg, momentum=0.9), ("lr", "momentum"), "FedAvg with server momentum (Hsu 2019)"
    ),
    "fedprox": Entry(
        partial(FedAvg, proximal_mu=0.01),
        ("lr", "proximal_mu"),
        "FedAvg whose clients are held near the global model (Li 2020)",
    ),
    "fedadagrad": Entry(
        partial(FedOpt, adagrad, beta1=0.0), ADAPTIVE, "Adagrad on the mean delta (Reddi 2021)"
    ),
    "fedadam": Entry(partial(FedOpt, adam), ADAPTIVE, "Adam on the mean delta (Reddi 2021)"),
    "fedyogi": Entry(partial(FedOpt, yogi), ADAPTIVE, "Yogi on the mean delta (Reddi 2021)"),
    "reptile": Entry(Reptile, ("lr",), "part of the way to the clients' even mean (Nichol 2018)"),
}


def build_strategy(section: StrategySection) -> Strategy:
    """The strategy a job names, `flwr:NAME` for one of Flower's own.

    Raises:
        ConfigError: the name is unknown, or a key has no meaning for it.
    """
    given = {k: v for k, v in section.model_dump().items() if k != "name" and v is not None}
    if section.name.startswith("flwr:"):
        from strategies.flower import FlowerStrategy

        return FlowerStrategy.named(section.name.removeprefix("flwr:"), given)
    entry = STRATEGIES.get(section.name)
    if entry is None:
        close = difflib.get_close_matches(section.name, STRATEGIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(STRATEGIES)}"
        raise ConfigError(f"strategy.name: unknown strategy {section.name!r}, {hint} (or flwr:NAME)")
    for key in given:
        if key not in entry.keys:
            raise ConfigError(
                f"strategy.{key}: {section.name} does not use it, expected only {', '.join(entry.keys)}"
            )
    return entry.build(**given)
