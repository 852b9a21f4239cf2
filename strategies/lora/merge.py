"""A strategy around the job's own, which merges LoRA's factors layer by layer instead of tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.average import average, is_trained
from atoll.strategies.lora.factors import (
    BASE,
    BASIS,
    CORE,
    A,
    B,
    Factors,
    LayerRound,
    Merged,
    aggregation_error,
)
from atoll.strategies.lora.fedex import fedex
from atoll.strategies.lora.fedsb import with_core
from atoll.strategies.lora.flexlora import flexlora
from atoll.strategies.lora.flora import flora
from atoll.strategies.lora.rolora import alternates
from atoll.strategies.mean import example_counts
from atoll.strategies.strategy import Plan, State, Strategy, tensors_for_clients

ERROR, RELATIVE = "lora.error.", "lora.relative_error."
"""Prefixes of a layer's error and relative error (`aggregation_error`) of the last round in the state."""

MERGES: Mapping[str | None, Callable[[LayerRound], Merged]] = {
    "fedex": fedex,
    "flora": flora,
    "flexlora": flexlora,
}
"""The merge of a layer by `tune.lora_merge`; values that are not here take the mean of each factor."""

ADDS_TO_BASE = ("fedex", "flora")
"""Values of `tune.lora_merge` that add to frozen weights."""

TRAINED: Mapping[str | None, Callable[[str, int], bool]] = {
    "rolora": alternates,
    "fedex": is_trained,
    "flora": is_trained,
}
"""Whether clients train and send a tensor in a round, by `tune.lora_merge`; all tensors for other values."""


def trained_in_round(tensors: Tensors, method: str | None, round: int) -> Tensors:
    """The tensors of a model that clients train and send in a round, which counts from 1."""
    if method not in TRAINED:
        return tensors
    return {name: t for name, t in tensors.items() if TRAINED[method](name, round)}


@dataclass(frozen=True)
class LoraMerge:
    """The `inner` strategy, followed by a merge of the factors of every LoRA layer.

    `scalings` are the layers' s by name, `frozen` the factors that are never trained.
    """

    inner: Strategy
    method: str | None
    seed: int
    scalings: Mapping[str, float]
    frozen: Tensors = field(default_factory=dict)

    def begin(self, model: Tensors) -> State:
        return self.inner.begin(trained_in_round(model, self.method, 1))

    def plan(self, state: State, round: int) -> Plan:
        return self.inner.plan(_inner(state), round)

    def tensors_for_clients(self, state: State) -> Tensors:
        """The tensors that the inner strategy sends."""
        return tensors_for_clients(self.inner, _inner(state))

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        round = updates.round if isinstance(updates, StackedUpdates) else updates[0].round
        trained = trained_in_round(model, self.method, round)
        step, after = self.inner.merge(trained, updates, _inner(state))
        moved, errors = {**model, **step}, dict[str, torch.Tensor | float]()
        counts = torch.tensor(example_counts(updates), dtype=torch.float64)
        for name, scaling in self.scalings.items():
            layer = self._layer(name, scaling, model, updates, moved, counts / counts.sum(), round)
            merged = MERGES.get(self.method, average)(layer)
            moved |= _as_tensors(name, merged, moved)
            errors[ERROR + name], errors[RELATIVE + name] = aggregation_error(
                layer, _as_stored(name, merged, moved)
            )
        return moved, {**after, **errors}

    def _layer(
        self,
        name: str,
        scaling: float,
        model: Tensors,
        updates: Sequence[Update],
        moved: Tensors,
        weights: torch.Tensor,
        round: int,
    ) -> LayerRound:
        ends, after = (CORE if self.method == "fedsb" else B, A), {**self.frozen, **moved}
        b, a = (self._of_clients(name + end, model, updates) for end in ends)
        merged_b, merged_a = (as_matrix(after[name + end], end) for end in ends)
        if self.method == "fedsb":
            basis = as_matrix(self.frozen[name + BASIS], BASIS)
            b, merged_b = with_core(basis, b), with_core(basis, merged_b)
        return LayerRound(
            weights, Factors(b, a), Factors(merged_b, merged_a), scaling,
            model.get(name + BASE, torch.zeros(())).to(torch.float64),
            partial(_fresh, self.seed, name, round, merged_a.shape),
        )  # fmt: skip

    def _of_clients(self, name: str, model: Tensors, updates: Sequence[Update]) -> torch.Tensor:
        """A factor of every client after training, [clients, rows, columns]."""
        start = as_matrix({**self.frozen, **model}[name], name)
        moved = _stack(updates, name)
        if moved is None:
            return start.expand(len(updates), *start.shape)
        return start + moved.to(torch.float64).reshape(len(updates), *start.shape)


def _stack(updates: Sequence[Update], name: str) -> torch.Tensor | None:
    """A tensor's delta at each client, [clients, …]; None where it wasn't trained."""
    if isinstance(updates, StackedUpdates):
        return updates.delta.get(name)
    return torch.stack([u.delta[name] for u in updates]) if name in updates[0].delta else None


def as_matrix(factor: torch.Tensor, name: str) -> torch.Tensor:
    """A factor in float64 as a matrix [r, in] or [out, r], also that of a convolution."""
    return factor.to(torch.float64).flatten(1) if name.endswith((A, B, BASIS, CORE)) else factor


def _as_tensors(name: str, merged: Merged, model: Tensors) -> Tensors:
    """The merged layer in the shapes and dtypes of the model's tensors."""
    values = {B: merged.factors.b, A: merged.factors.a, BASE: merged.base}
    return {
        name + end: value.reshape(model[name + end].shape).to(model[name + end].dtype)
        for end, value in values.items()
        if value is not None and name + end in model
    }


def _as_stored(name: str, merged: Merged, model: Tensors) -> Merged:
    """The merged layer after rounding to the dtypes of the model's tensors, in float64."""
    b, a = (
        as_matrix(model[name + end], end) if name + end in model else exact
        for end, exact in ((B, merged.factors.b), (A, merged.factors.a))
    )
    return Merged(Factors(b, a), None if merged.base is None else model[name + BASE].to(torch.float64))


def _fresh(seed: int, name: str, round: int, shape: torch.Size) -> torch.Tensor:
    """A new A [r, in] after a round, uniform in ± 1 / sqrt(in)."""
    draw = torch.rand(shape, generator=stream(seed, "lora", name, round), dtype=torch.float64)
    return (2 * draw - 1) / math.sqrt(shape[1])


def _inner(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith((ERROR, RELATIVE))}


def aggregation_errors(state: State) -> dict[str, tuple[float, float]]:
    """(error, relative error) of the last merge by layer; empty where no factors are merged."""
    errors = {n.removeprefix(ERROR): float(v) for n, v in state.items() if n.startswith(ERROR)}
    return {name: (error, float(state[RELATIVE + name])) for name, error in errors.items()}
