"""Causal models for DPO: the log-ratio of a completion's probabilities now and before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from atoll.backbones.encoder import TARGETS, Batch
from atoll.tasks.language_modeling.causal import CausalEncoder, CausalModel, prepared
from atoll.tasks.language_modeling.template import Tokens

WANTED = "wanted"
"""The name under which a batch holds each learnt token plus one, and 0 where there is none."""
_CHOSEN, _REJECTED = "chosen", "rejected"


def prepared_pair(chosen: Tokens, rejected: Tokens) -> Batch:
    """A pair as an element of a shard's inputs."""
    return {
        f"{side}.{name}": tensor
        for side, tokens in ((_CHOSEN, chosen), (_REJECTED, rejected))
        for name, tensor in prepared(tokens).items()
    }


class PairEncoder(CausalEncoder):
    """Collates pairs, or prompts alone as for language modelling."""

    def collate(self, ready: Sequence[Batch]) -> Batch:
        """`input_ids` and `attention_mask` [batch, 2, tokens]; `places` and `wanted` [batch, 2, learnt]."""
        if f"{_CHOSEN}.input_ids" not in ready[0]:
            return super().collate(ready)
        names = ("input_ids", "places")
        sides = [{n: one[f"{side}.{n}"] for n in names} for one in ready for side in (_CHOSEN, _REJECTED)]
        batch = super().collate(sides)
        wanted = torch.zeros_like(batch["places"])
        for line, one in zip(wanted, sides, strict=True):
            line[: len(one["places"])] = one["input_ids"][one["places"] + 1] + 1
        return {n: t.view(len(ready), 2, -1) for n, t in (batch | {WANTED: wanted}).items()}


class PairModel(CausalModel):
    """Predicts, for each completion of a pair, its log-probability minus the reference model's.

    The reference is the model before the first round: the same network with the initial values of its tuned
    tensors (with LoRA, adapters that add nothing). So frozen tensors aren't stored twice.
    """

    encoder_kind = PairEncoder
    _start: dict[str, torch.Tensor]

    def remember_start(self) -> None:
        self._start = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def remember_unmerged(self, name: str, layer: nn.Module) -> None:
        parts = {part for part in self._start if part.startswith(f"{name}.")}
        self._start = {part: tensor for part, tensor in self._start.items() if part not in parts}
        self._start[f"{name}.weight"] = layer.get_parameter("weight").detach().clone()

    def forward(self, batch: Batch, is_reference: bool = False) -> torch.Tensor:
        """log p - log p of the reference, [batch, 2]: for the chosen and the rejected completion."""
        if is_reference:
            return self._log_likelihood(batch)
        return self._log_likelihood(batch) - self.reference(batch)

    def reference(self, batch: Batch) -> torch.Tensor:
        """log p of each completion under the reference, [batch, 2], without gradient and dropout."""
        start = {name: t.to(batch["input_ids"].device) for name, t in self._start.items()}
        with torch.no_grad(), _measuring(self):
            likelihoods: torch.Tensor = functional_call(self, start, (batch, True))
        return likelihoods

    def predict(self, batch: Batch) -> Any:
        """The log-ratios of pairs, [batch, 2]; for prompts, the texts that the model writes after them."""
        return self(batch) if WANTED in batch else self.written(batch)

    def measure(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-ratios [batch, 2], once for metrics and once for the loss."""
        ratios = self(batch)
        return ratios, ratios

    def _log_likelihood(self, batch: Batch) -> torch.Tensor:
        both = {name: t.flatten(0, 1) for name, t in batch.items()}
        both[TARGETS] = both[WANTED] - 1
        surprise = super().forward(both) * (both[WANTED] > 0)
        return -surprise.sum(1).view(-1, 2)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Within, all layers are in evaluation mode, so that nothing is random."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
