"""A client's learning rate in each local step: by the round, the step's number and a parameter's block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from atoll.backbones.encoder import Model
from atoll.job.job import Job
from atoll.job.train import TrainSection, lr_factor, lr_of_round
from atoll.learning.trainable import blocks

LearningRate = float | torch.Tensor
"""One for all clients of a stack, or one for each of them, [clients]."""


@dataclass(frozen=True)
class StepRates:
    """The learning rate of every local step of clients that train together.

    `lr` is the round's, and `factors` what part of it a step takes, [steps, clients]; none where all take it.
    """

    lr: float
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, job: Job, round: int, steps: Sequence[int], device: str) -> StepRates:
        """Of clients that take so many steps each: a cosine goes down to the end of a client's own."""
        train = job.train
        lr = lr_of_round(train, round, job.federation.rounds)
        if not train.varies_by_step:
            return cls(lr)
        own = [[lr_factor(train, s + 1, count) for count in steps] for s in range(max(steps, default=0))]
        return cls(lr, torch.tensor(own, dtype=torch.float64).to(device))

    def at(self, step: int, clients: int = 1) -> LearningRate:
        """That of a step, from 0, for the first so many clients; one client's is a number."""
        if self.factors is None:
            return self.lr
        rates = self.factors[step, :clients] * self.lr
        return rates.to(torch.float32)

    def factor(self, step: int) -> float:
        """What part of the round's learning rate the only client's step takes."""
        return 1.0 if self.factors is None else float(self.factors[step, 0])


def layer_rates(model: Model, train: TrainSection) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by, by name; nothing without `layer_decay`.

    The head takes all of it, the block below `layer_decay` times it, the next one its square, and so on, as
    in ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2022, `get_num_layer_for_vit`). Embeddings are the
    lowest block; a parameter that lies in no block goes with them.
    """
    if train.layer_decay is None:
        return {}
    network = model.backbone.model
    networks = list(network.children()) if isinstance(network, nn.ModuleDict) else [network]
    of_parameter: dict[int, float] = {}
    lowest = 1.0
    for each in networks:
        rate = 1.0
        for block in reversed(_blocks(each, model.head)):
            rate *= train.layer_decay
            of_parameter |= {id(p): rate for p in block.parameters()}
        lowest = min(lowest, rate)
    of_parameter |= {id(p): 1.0 for p in model.head.parameters()}
    return {name: of_parameter.get(id(p), lowest) for name, p in model.named_parameters()}


def _blocks(network: nn.Module, head: nn.Module) -> list[nn.Module]:
    """From input to output; a head that is a part of the network is no block, nor are its own parts."""
    is_inside = any(module is head for module in network.modules())
    parts = set(head.modules())
    return [block for block in blocks(network, head if is_inside else None) if block not in parts]


def groups_of(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], lr: float
) -> list[nn.Parameter] | list[dict[str, object]]:
    """The parameters as torch's optimizers take them: a group for every learning rate."""
    if not rates:
        return list(parameters.values())
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault(rates[name], []).append(parameter)
    return [{"params": own, "lr": lr * rate} for rate, own in found.items()]
