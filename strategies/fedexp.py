"""FedExP (Jhunjhunwala et al. 2023, "FedExP: Speeding Up Federated Averaging via Extrapolation").

The model moves by eta_g times the mean delta d = sum_i p_i d_i. The server's step size eta_g comes from the
deltas of each round: eta_g = max(1, sum_i p_i ||d_i||^2 / (2 (||d||^2 + epsilon))). It is larger than 1
where the clients' deltas point apart, as late in a run over unlike shards. p_i is a client's share of the
examples, which is the paper's 1 / M where all have the same number. The paper measures the mean of the last
two models; here the model is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import delta_of, example_counts, moved, squared_norm, weighted_mean
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedExp:
    """Move by the mean delta times a step size of at least 1."""

    epsilon: float = 1e-3

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        mean = weighted_mean(updates)
        step_size = extrapolation(updates, mean, self.epsilon)
        return moved(model, {name: step_size * d for name, d in mean.items()}), state


def extrapolation(updates: Sequence[Update], mean: Tensors, epsilon: float) -> float:
    """The paper's step size eta_g, given the updates and their weighted mean; 1 where nothing moved."""
    counts = example_counts(updates)
    spread = sum(n * squared_norm(delta_of(updates, i)) for i, n in enumerate(counts)) / sum(counts)
    below = 2 * (squared_norm(mean) + epsilon)
    return max(1.0, spread / below) if below else 1.0
