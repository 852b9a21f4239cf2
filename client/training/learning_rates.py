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

    `lr` is the round's rate. `factors` [steps, clients] multiply it in each step; None where all are 1.
    """

    lr: float
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, job: Job, round: int, steps: Sequence[int], device: str) -> StepRates:
        """The rates of clients that each take so many `steps`; a cosine ends at each client's last step."""
        train = job.train
        lr = lr_of_round(train, round, job.federation.rounds)
        if not train.varies_by_step:
            return cls(lr)
        factors = [[lr_factor(train, s + 1, count) for count in steps] for s in range(max(steps, default=0))]
        return cls(lr, torch.tensor(factors, dtype=torch.float64).to(device))

    def at(self, step: int, clients: int = 1) -> LearningRate:
        """The rate of a step, from 0, of the first `clients` clients: one for all, or [clients], float32."""
        if self.factors is None:
            return self.lr
        rates = self.factors[step, :clients] * self.lr
        return rates.to(torch.float32)

    def factor(self, step: int) -> float:
        """The factor of a single client's step, by which the round's rate is multiplied."""
        return 1.0 if self.factors is None else float(self.factors[step, 0])


def layer_rates(model: Model, train: TrainSection) -> dict[str, float]:
    """The factor of each parameter's learning rate, by name; empty without `layer_decay`.

    It is 1 for the head, `layer_decay` for the block below it, its square for the next block, and so on, as
    in ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2022, `get_num_layer_for_vit`). Embeddings, and
    parameters outside of all blocks, count as the lowest block.
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
    """The network's blocks from input to output, without a head that is a part of the network."""
    is_inside = any(module is head for module in network.modules())
    parts = set(head.modules())
    return [block for block in blocks(network, head if is_inside else None) if block not in parts]


def groups_of(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], lr: float
) -> list[nn.Parameter] | list[dict[str, object]]:
    """The parameters as torch's optimizers take them, with a group for each learning rate."""
    if not rates:
        return list(parameters.values())
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_rate.setdefault(rates[name], []).append(parameter)
    return [{"params": group, "lr": lr * rate} for rate, group in by_rate.items()]
