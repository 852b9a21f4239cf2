"""Survival models: a linear Cox model (Cox 1972), or an MLP.

A score is the logarithm of a patient's hazard relative to the baseline hazard. Adding a constant to all
scores changes nothing, so the last layer has no bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.encoder import Batch, Encoder, Model
from atoll.backbones.options import options_of, refuse_options
from atoll.backbones.resolve import Backbone
from atoll.errors import DataError, WeightsError
from atoll.job.job import Job
from atoll.job.section import Count, Decay, Section
from atoll.protocol.random_streams import global_stream
from atoll.tasks.survival.data import SurvivalOptions

LINEAR, HIDDEN = "linear", "mlp"


class MlpOptions(Section):
    """`backbone.options` of atoll:mlp: hidden layers of one width."""

    width: Count = 32
    layers: Count = 1
    dropout: Decay = 0.0


class FeatureEncoder(Encoder):
    """Encodes named numbers, standardised as the job says, as features [batch, width]."""

    def __init__(
        self,
        model: nn.Module,
        width: int,
        names: Sequence[str],
        scale: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._places = [(name, *scale.get(name, (0.0, 1.0))) for name in names]

    def preprocess(self, inputs: Sequence[Mapping[str, float]]) -> list[torch.Tensor]:
        for row in inputs:
            if missing := [name for name, _, _ in self._places if name not in row]:
                raise DataError(f"input: no {missing[0]!r}, expected a number for each feature")
        return [
            torch.tensor([(row[name] - mean) / deviation for name, mean, deviation in self._places])
            for row in inputs
        ]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        return {"features": torch.stack(list(ready)).float()}

    def forward(self, batch: Batch) -> torch.Tensor:
        features: torch.Tensor = self.model(batch["features"])
        return features


class CoxModel(Model):
    """Predicts scores [batch], the logarithms of hazards relative to the baseline hazard."""

    def forward(self, batch: Batch) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.backbone(batch))
        return scores.squeeze(1)


def load_cox(backbone: Backbone, job: Job, options: SurvivalOptions, names: Sequence[str]) -> CoxModel:
    """The network with its resolved weights and a new head; `names` are the features in their order.

    Raises:
        WeightsError: the backbone doesn't read tables of features, or its weights don't fit.
    """
    network, width = _network(backbone, job, len(names))
    with global_stream(job.seed, "init", "head"):
        head = nn.Linear(width, 1, bias=False)
    return CoxModel(FeatureEncoder(network, width, names, options.scale), head)


def _network(backbone: Backbone, job: Job, count: int) -> tuple[nn.Module, int]:
    if backbone.kind != "atoll" or backbone.name not in (LINEAR, HIDDEN):
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not read tables of features, expected atoll:{LINEAR} or"
            f" atoll:{HIDDEN}"
        )
    if backbone.name == LINEAR:
        refuse_options(job.backbone.options, "backbone.options", job.backbone.name)
        if backbone.weights is not None:
            raise WeightsError(
                f'backbone.weights: atoll:{LINEAR} has none before its head, expected "random",'
                f" found {job.backbone.weights!r}"
            )
        return nn.Identity(), count
    known = options_of(job.backbone.options, MlpOptions, "backbone.options")
    with global_stream(job.seed, "init", "backbone"):
        network = _hidden_layers(count, known)
    if backbone.weights is not None:
        load_state_dict_strict(network, load_weights(backbone.weights), backbone.weights)
    return network, known.width


def _hidden_layers(count: int, known: MlpOptions) -> nn.Module:
    layers: list[nn.Module] = []
    for width in [count] + [known.width] * (known.layers - 1):
        layers += [nn.Linear(width, known.width), nn.ReLU()]
        layers += [nn.Dropout(known.dropout)] if known.dropout else []
    return nn.Sequential(*layers)
