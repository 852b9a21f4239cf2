"""The strategy that merges rows by a robust rule, and the rule of each name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.options import (
    CenteredClippingOptions,
    GeometricMedianOptions,
    HostileOptions,
    MultiKrumOptions,
    NormBoundOptions,
)
from atoll.strategies.robust.bulyan import bulyan
from atoll.strategies.robust.centered_clipping import CenteredClipping
from atoll.strategies.robust.coordinate_median import coordinate_median
from atoll.strategies.robust.geometric_median import geometric_median
from atoll.strategies.robust.krum import krum, multi_krum
from atoll.strategies.robust.norm_bound import norm_bound
from atoll.strategies.robust.rows import moved_by, rows_to_merge
from atoll.strategies.robust.trimmed_mean import trimmed_mean
from atoll.strategies.strategy import Plan, State, Strategy

Rule = Callable[[torch.Tensor], torch.Tensor]
"""A merge rule: rows [clients, numbers] to one row [numbers], in float64."""


@dataclass(frozen=True)
class RobustMerge:
    """Move by `lr` times the rule's merge of the clients' deltas, which all have the same weight."""

    rule: Rule
    options: HostileOptions
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        rows = rows_to_merge(model, updates, self.options)
        return moved_by(model, self.rule(rows), self.lr), state


def robust_strategy(name: str, options: HostileOptions, lr: float = 1.0) -> Strategy:
    """The robust strategy of this name; `options` must be of the registry's model for the name."""
    if isinstance(options, CenteredClippingOptions):
        return CenteredClipping(options, lr)
    return RobustMerge(_rule(name, options), options, lr)


def _rule(name: str, options: HostileOptions) -> Rule:
    match options:
        case GeometricMedianOptions():
            return partial(geometric_median, smoothing=options.smoothing, iterations=options.iterations)
        case NormBoundOptions():
            return partial(norm_bound, clipping_norm=options.clipping_norm)
        case MultiKrumOptions():
            return partial(multi_krum, hostile=options.hostile, selected=options.selected)
    if name == "coordinate-median":
        return coordinate_median
    rules = {"trimmed-mean": trimmed_mean, "krum": krum, "bulyan": bulyan}
    return cast(Rule, partial(rules[name], hostile=options.hostile))
