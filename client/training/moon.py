"""MOON's term in a local step (Li et al. 2021); `strategies/unlike_shards/moon.py` has the symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from atoll.backbones.encoder import Batch, Model
from atoll.learning import trainable
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class ModelContrast:
    """The models that compute z_glob and z_prev, as trainable tensors by name, and the paper's mu and tau."""

    received: Tensors
    previous: Tensors
    mu: float
    temperature: float

    def outputs(self, model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the head's outputs [batch, outputs], mu times l_con) of a batch, with the model's present tensors.

        The other two models process the batch without dropout.
        """
        z_glob, z_prev = (
            _representation(model, tensors, batch) for tensors in (self.received, self.previous)
        )
        z = model.backbone(batch)
        return model.head(z), self.mu * contrast(z.float(), z_glob, z_prev, self.temperature)


def contrast(z: torch.Tensor, z_glob: torch.Tensor, z_prev: torch.Tensor, temperature: float) -> torch.Tensor:
    """The paper's l_con, a scalar: the mean over a batch of representations [batch, width]."""
    near, far = (nn.functional.cosine_similarity(z, other, dim=1) for other in (z_glob, z_prev))
    return -nn.functional.log_softmax(torch.stack([near, far], dim=1) / temperature, dim=1)[:, 0].mean()


def _representation(model: Model, tensors: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """The head's inputs [batch, width] in a model with other tensors, without a gradient."""
    of_backbone = {
        name: tensors[f"backbone.{name}"].to(p.device, p.dtype)
        for name, p in trainable.trainable(model.backbone).items()
    }
    model.backbone.eval()
    with torch.no_grad():
        outputs: torch.Tensor = functional_call(model.backbone, of_backbone, (batch,))
    trainable.training_mode(model)
    return outputs.float()
