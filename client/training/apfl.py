"""A local step of APFL for a network: w_i beside v_i; `client/state/apfl.py` has the symbols."""

from __future__ import annotations

import torch
from torch import nn

from atoll.backbones.encoder import Model
from atoll.client.training.learning_rates import StepRates, groups_of, layer_rates
from atoll.client.training.optimizers import set_step, torch_optimizer
from atoll.client.training.per_fedavg import Backward
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.protocol.tensors import Tensors


class SharedBeside:
    """The model w_i, which trains beside v_i in the same network, and the mixing weight alpha."""

    def __init__(self, model: Model, start: Tensors, job: Job, rates: StepRates, alpha: float) -> None:
        self.parameters, self.alpha, self.job, self.rates = trainable.trainable(model), alpha, job, rates
        self.w = {name: nn.Parameter(start[name].clone()) for name in self.parameters}
        groups = groups_of(self.w, layer_rates(model, job.train), rates.lr)
        self.optimizer = torch_optimizer(groups, job.train, rates.lr)

    def step(self, backward: Backward, number: int) -> list[float]:
        """Take w_i's step by a batch, leave v_i's gradient in the network; the mixture's losses by part."""
        v = {name: p.detach().clone() for name, p in self.parameters.items()}
        before = {name: p.detach().clone() for name, p in self.w.items()}
        self._load(before)
        list(backward(number))
        for name, p in self.parameters.items():
            self.w[name].grad = None if p.grad is None else p.grad.clone()
        if self.job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.w.values(), self.job.train.clip_norm)
        set_step(self.optimizer, self.rates.factor(number))
        self.optimizer.step()
        self._load({name: self.alpha * v[name] + (1 - self.alpha) * before[name] for name in v})
        losses = list(backward(number))
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad *= self.alpha
        self._load(v)
        return losses

    def _load(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
