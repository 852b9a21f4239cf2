"""Agnostic federated learning (Mohri et al. 2019): the least loss for the worst mixture of the clients' data.

min over w of max over lambda in the simplex of sum_i lambda_i L_i(w), over all N clients i. In round t each
client sends L_i(w), the loss of the model that it received on its training examples, and its delta d_i,
which for one step over all its examples is -gamma_w grad L_i(w). STOCHASTIC-AFL steps both at once:

    w      <- w + `lr` sum_i lambda_i d_i
    lambda <- the point of the simplex nearest to lambda + gamma_lambda (L_1(w), ..., L_N(w))

with lambda_i = 1 / N at first. gamma_lambda is `lambda_lr`; gamma_w is the clients' learning rate. Where only
n of N clients send, both sums are the paper's unbiased estimates from uniformly drawn clients: those that
send count N / n times, the others zero. The nearest point is found as in Duchi et al. 2008. The paper's bound
is for the mean of all models; here the model is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.messages import RECEIVED_LOSS, Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved, sent_numbers, weighted_sum
from atoll.strategies.strategy import Plan, State

PREFIX = "lambda."
"""The prefix, before a client's name, of its weight in the strategy's state."""
UNSEEN = "lambda"
"""The name, in the state, of the weight of each client that has never sent anything."""


@dataclass(frozen=True)
class AgnosticFederatedLearning:
    """Move by deltas weighted by lambda, and lambda towards the clients with the largest losses."""

    clients: int
    lambda_lr: float = 0.1
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {UNSEEN: 1 / self.clients}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: an update lacks the loss of the received model.
        """
        losses = sent_numbers(updates, RECEIVED_LOSS)
        names = sorted({n.removeprefix(PREFIX) for n in state if n.startswith(PREFIX)} | losses.keys())
        unseen = max(0, self.clients - len(names))
        weights = {name: float(state.get(PREFIX + name, state[UNSEEN])) for name in names}
        scale = max(1.0, self.clients / len(losses))
        mixture = torch.tensor([weights[name] for name in losses], dtype=torch.float64)
        step = weighted_sum(updates, self.lr * scale * mixture)
        for name, loss in losses.items():
            weights[name] += self.lambda_lr * scale * loss
        after = nearest_in_simplex([*weights.values(), *[float(state[UNSEEN])] * unseen])
        weights_after: State = {PREFIX + name: value for name, value in zip(weights, after, strict=False)}
        return moved(model, step), {**weights_after, UNSEEN: after[-1] if unseen else 0.0}


def nearest_in_simplex(values: Sequence[float]) -> list[float]:
    """The weights, at least 0 and with sum 1, that are nearest to the values in L2 distance.

    >>> nearest_in_simplex([0.5, 1.0, -3.0])
    [0.25, 0.75, 0.0]
    """
    sums, shift = 0.0, 0.0
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        sums += value
        if value > (sums - 1) / count:
            shift = (sums - 1) / count
    return [max(value - shift, 0.0) for value in values]
