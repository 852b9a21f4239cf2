"""Clipping norms that follow a quantile of a client's gradients' norms, estimated with differential privacy.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", with examples in the place of
clients and local steps in that of rounds (`atoll/privacy/adaptive_clipping.py` has the formulas). In each
step a client counts the drawn examples whose gradient was within its norm, and adds noise to the count; the
norm that follows from it is used from the next step on. Count and sum together cost what the sum alone costs
where the norm is fixed. The norm stays at the client, from its last round to its next one.

A norm is kept as its `scale`, a multiple of the job's `clipping_norm` C. Gradients are divided by the scale,
clipped to C, summed and noised, and the noised sum is multiplied by the scale: the scale is known before the
step, so the noise is that of a norm of C times the scale, on one grid for all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from atoll.client.state.store import ClientStateStore
from atoll.privacy.adaptive_clipping import noised_fraction, update_clipping_norm
from atoll.privacy.noise import Lattice, RandomBits
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainingRequest
from atoll.protocol.stacked_updates import StackedUpdates

SCALE = "clipping_scale"
"""The name of a client's scale after a round, in its stored state; it never leaves the client."""
SMALLEST, LARGEST = 1e-6, 1e6
"""Scales stay between these, where single precision has room for them."""


@dataclass(frozen=True)
class AdaptiveNorm:
    """How norms move: `quantile` and `lr`, the counts' noise, and what is expected in a batch.

    `random_bits` returns a client's source of noise for its counts, apart from that for its sums. `begin` has
    the scales of clients that have one from an earlier round.
    """

    quantile: float
    lr: float
    count_deviation: float
    expected_batch: float
    random_bits: Callable[[str], RandomBits]
    begin: Mapping[str, float] = field(default_factory=dict)


class ClippingScales:
    """The scales of clients that train together, in the order of `clients`, from step to step."""

    def __init__(self, adaptive: AdaptiveNorm, clients: Sequence[str], steps: int) -> None:
        self.adaptive = adaptive
        self.clients = clients
        self.now = [adaptive.begin.get(client, 1.0) for client in clients]
        self._noise = [
            Lattice(adaptive.count_deviation, adaptive.random_bits(client)).noise(steps).tolist()
            for client in clients
        ]
        self._counts: list[tuple[int, int]] = []

    def column(self, like: torch.Tensor) -> torch.Tensor:
        """The scales of the first clients, [clients, 1, …], with the dimensions of `like` [clients, …]."""
        return like.new_tensor(self.now[: len(like)]).view(-1, *[1] * (like.ndim - 1))

    def count(self, within: torch.Tensor, drawn: torch.Tensor) -> None:
        """Note which gradients were within the norm, and which examples were drawn, both [clients, batch]."""
        numbers = (within & drawn).sum(1).tolist(), drawn.sum(1).tolist()
        self._counts = list(zip(*numbers, strict=True))

    def follow(self, step: int) -> None:
        """Move each scale by the noised count of the step."""
        how = self.adaptive
        for place, (within, drawn) in enumerate(self._counts):
            fraction = noised_fraction(
                within, drawn, noise=self._noise[place][step], expected_cohort=how.expected_batch
            )
            moved = update_clipping_norm(self.now[place], fraction, quantile=how.quantile, lr=how.lr)
            self.now[place] = min(max(moved, SMALLEST), LARGEST)


def with_stored_scales(
    adaptive: AdaptiveNorm, clients: Sequence[str], request: TrainingRequest, memory: ClientStateStore
) -> AdaptiveNorm:
    """The same with the scales that these clients have from their last round before the request's."""
    states = {client: memory.load_before(request.run, client, request.round) for client in clients}
    return replace(adaptive, begin={c: float(state[SCALE]) for c, state in states.items() if SCALE in state})


def store_scales(
    updates: Iterable[Update], request: TrainingRequest, memory: ClientStateStore
) -> Iterable[Update]:
    """The updates without their clients' scales, which are stored before an update is returned."""
    if not isinstance(updates, StackedUpdates):
        return (_stored(update, request, memory) for update in updates)
    scales = updates.states[SCALE]
    memory.save(
        request.run,
        request.round,
        {client: {SCALE: scale.clone()} for client, scale in zip(updates.clients, scales, strict=True)},
    )
    return replace(updates, states=_without_scale(updates.states))


def _stored(update: Update, request: TrainingRequest, memory: ClientStateStore) -> Update:
    memory.save(request.run, request.round, {update.client: {SCALE: update.states[SCALE]}})
    return replace(update, states=_without_scale(update.states))


def _without_scale(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in states.items() if name != SCALE}
