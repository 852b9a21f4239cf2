"""The precision that local training computes in; weights, optimizers and updates stay in float32.

Matrix products and convolutions run in 16 bits where torch.autocast says so, the loss in float32. With
`fp16` the loss is scaled so that small gradients don't vanish (Micikevicius et al. 2018): a step whose
gradients overflow is left out and the scale halved. The scale begins anew in every round, as the
optimizer does, so that a round depends on nothing but the model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from atoll.job.train import TrainSection

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**10
"""The initial loss scale. With torch's default, 2^16, the first steps overflow, and a round has few steps."""


def autocast(train: TrainSection) -> AbstractContextManager[object]:
    """A context in which the network computes in the job's precision."""
    if train.precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(train.device).type, dtype=TYPES[train.precision])


def scaler_of(train: TrainSection) -> torch.amp.GradScaler:
    """A new loss scaler; it does nothing unless the precision is fp16."""
    device = torch.device(train.device).type
    return torch.amp.GradScaler(device, init_scale=FIRST_SCALE, enabled=train.precision == "fp16")


def to_float32(outputs: torch.Tensor) -> torch.Tensor:
    """A network's outputs for the loss: 16-bit floats are converted to float32."""
    return outputs.float() if outputs.dtype in TYPES.values() else outputs
