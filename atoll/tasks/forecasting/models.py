"""Forecasting networks: LSTM and GRU, or transformers' PatchTST and PatchTSMixer.

Each window is standardised by the mean and standard deviation of its own history (Kim et al. 2022,
"Reversible Instance Normalization"), so no statistics of the clients' data are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_transformer, load_weights
from atoll.backbones.encoder import Batch, Encoder, Model
from atoll.backbones.options import RecurrentLayers, options_of
from atoll.backbones.resolve import Backbone
from atoll.errors import WeightsError
from atoll.job.job import Job
from atoll.job.section import Count
from atoll.protocol.random_streams import global_stream
from atoll.tasks.forecasting.data import ForecastOptions

RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentOptions(RecurrentLayers):
    """`backbone.options` of atoll:lstm and atoll:gru."""

    width: Count = 64


class WindowEncoder(Encoder):
    """Encodes windows, standardised by their history, as features for the head."""

    def __init__(self, model: nn.Module, width: int, options: ForecastOptions) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._options = options

    def preprocess(self, inputs: Sequence[dict[str, Any]]) -> list[Batch]:
        steps, ahead = self._options.history, self._options.horizon
        seen, known = len(self._options.observed), len(self._options.known)
        return [
            {
                "history": torch.tensor(window["history"]),
                "observed": torch.tensor(window["observed"]).reshape(steps, seen),
                "known": torch.tensor(window["known"]).reshape(steps + ahead, known),
            }
            for window in inputs
        ]

    def collate(self, ready: Sequence[Batch]) -> Batch:
        return {name: torch.stack([one[name] for one in ready]).float() for name in ready[0]}

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch, width + history + horizon * known]: features, past values, and known future covariates.

        With the past values the head can repeat the last value, or the last season, from the first round on.
        """
        mean, scale = units(batch["history"])
        value = ((batch["history"] - mean) / scale).unsqueeze(2)
        known, steps = in_units(batch["known"]), batch["history"].shape[1]
        inputs = torch.cat([value, in_units(batch["observed"]), known[:, :steps]], dim=2)
        return torch.cat([self._summary(inputs), value[:, :, 0], known[:, steps:].flatten(1)], dim=1)

    def _summary(self, inputs: torch.Tensor) -> torch.Tensor:
        """The network's features, [batch, width], of inputs [batch, steps, columns]."""
        if not hasattr(self.model, "config"):
            states: torch.Tensor = self.model(inputs)[0]
            return states[:, -1]
        hidden: torch.Tensor = self.model(past_values=inputs).last_hidden_state
        return hidden.flatten(1, -2).mean(1)


def units(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) of each history [batch, steps], both [batch, 1]; the deviation of constants is 1."""
    mean = history.mean(dim=1, keepdim=True)
    deviation = (history - mean).square().mean(dim=1, keepdim=True).sqrt()
    return mean, torch.where(deviation > 1e-6 * mean.abs() + 1e-12, deviation, torch.ones_like(deviation))


def in_units(columns: torch.Tensor) -> torch.Tensor:
    """Each column of [batch, steps, columns] standardised over its own steps."""
    if not columns.shape[2]:
        return columns
    batch, steps, count = columns.shape
    flat = columns.transpose(1, 2).reshape(batch * count, steps)
    mean, scale = units(flat)
    return ((flat - mean) / scale).reshape(batch, count, steps).transpose(1, 2)


class Forecaster(Model):
    """Predicts quantiles of future values, in the series' own units."""

    def __init__(self, backbone: WindowEncoder, head: nn.Module, horizon: int) -> None:
        super().__init__(backbone, head)
        self._horizon = horizon

    def forward(self, batch: Batch) -> torch.Tensor:
        """The predicted quantiles, [batch, horizon, quantiles]."""
        mean, scale = units(batch["history"])
        outputs: torch.Tensor = self.head(self.backbone(batch))
        outputs = outputs.reshape(len(mean), self._horizon, -1)
        return outputs * scale.unsqueeze(2) + mean.unsqueeze(2)

    def predict(self, batch: Batch) -> torch.Tensor:
        """As `forward`, with each step's quantiles sorted."""
        return self.forward(batch).sort(dim=2).values


def load_forecaster(backbone: Backbone, job: Job, options: ForecastOptions) -> Forecaster:
    """The network with its resolved weights and a new head.

    Raises:
        WeightsError: the backbone doesn't read series, or its weights don't fit.
    """
    columns = 1 + len(options.observed) + len(options.known)
    network, width = _network(backbone, job, options, columns)
    outputs_per_series = options.horizon * len(options.quantiles)
    with global_stream(job.seed, "init", "head"):
        head = nn.Linear(width + options.history + options.horizon * len(options.known), outputs_per_series)
    return Forecaster(WindowEncoder(network, width, options), head, options.horizon)


def _by_steps(name: str) -> Any:
    """Opacus's version of the recurrent network, for which per-example gradients can be computed."""
    from opacus.layers import DPGRU, DPLSTM

    return {"lstm": DPLSTM, "gru": DPGRU}[name]


def _network(backbone: Backbone, job: Job, options: ForecastOptions, columns: int) -> tuple[nn.Module, int]:
    if backbone.kind == "hf":
        transformer = load_transformer(backbone, job.seed)
        length, channels = (
            getattr(transformer.config, n, None) for n in ("context_length", "num_input_channels")
        )
        if (length, channels) != (options.history, columns):
            raise WeightsError(
                f"backbone.name: {job.backbone.name} reads {length} steps of {channels} columns,"
                f" the job has {options.history} of {columns}"
            )
        return transformer, int(transformer.config.d_model)
    if backbone.kind != "atoll" or backbone.name not in RECURRENT:
        names = ", ".join(f"atoll:{name}" for name in RECURRENT)
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not read series, expected {names} or a folder of"
            " transformers' PatchTST or PatchTSMixer"
        )
    known = options_of(job.backbone.options, RecurrentOptions, "backbone.options")
    with global_stream(job.seed, "init", "backbone"):
        kind = _by_steps(backbone.name) if "example" in job.privacy.units else RECURRENT[backbone.name]
        network: nn.Module = kind(columns, known.width, known.layers, batch_first=True, dropout=known.dropout)
    if backbone.weights is not None:
        load_state_dict_strict(network, load_weights(backbone.weights), backbone.weights)
    return network, known.width
