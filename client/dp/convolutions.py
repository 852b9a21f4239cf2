"""The rule for gradients of each example of a convolution, for pictures in any memory layout.

Opacus' rule reads the inputs by the strides of a contiguous tensor, and so, of pictures in channels-last
layout, other numbers of the same picture than the convolution did.
"""

from __future__ import annotations

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import nn


@register_grad_sampler([nn.Conv1d, nn.Conv2d, nn.Conv3d])  # type: ignore[untyped-decorator, unused-ignore]
def convolution_gradients(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Each example's gradient, [batch, *parameter], by the parameters that are trained."""
    found: dict[nn.Parameter, torch.Tensor] = compute_conv_grad_sample(
        layer, [inputs[0].contiguous()], backprops.contiguous()
    )
    return found
