"""Heads of one or two linear layers, stacked over clients: their outputs and gradients in closed form.

A layer is one matrix [clients, outputs, inputs] with the bias as one more input that is always
one. Inputs are padded with zeros to a multiple of 16, so that rows start on cache lines; then
every slice of a batched product has the same bits however many slices there are (seen to hold
with one thread). What is padded gets no gradient and stays zero.

Errors are per example: with a(l) a layer's input and e(l) the loss's derivative in its output,
the gradient of one example is the outer product e(l) a(l)', whose norm is |e(l)| |a(l)|
(Goodfellow 2015, "Efficient per-example gradient computations").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.tensors import Tensors

ALIGN = 16

Stack = list[torch.Tensor]
"""One matrix [clients, outputs, padded inputs] for each layer, from the features to the outputs."""


def padded(width: int) -> int:
    """A layer's number of inputs in memory: one more for the bias, rounded up to a multiple of 16."""
    return width + 1 + -(width + 1) % ALIGN


@dataclass(frozen=True)
class Layer:
    """One linear layer of the head: its tensors' names, and its sizes without padding."""

    weight: str
    bias: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Layers:
    """The layers of a head from the features to the outputs, a ReLU between any two."""

    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, head: Tensors) -> Layers:
        """The layers of a head's tensors `*.weight` [outputs, inputs] and `*.bias`, in order of names."""
        weights = sorted(name for name in head if name.endswith(".weight"))
        layers = (Layer(name, name.removesuffix("weight") + "bias", *head[name].shape) for name in weights)
        return cls(tuple(layers))

    def stack(self, head: Tensors, device: str) -> Stack:
        """The head as matrices [1, outputs, padded inputs]; hidden outputs are padded as inputs are."""
        stacked = []
        for layer in self.layers:
            is_last = layer is self.layers[-1]
            rows = layer.outputs if is_last else padded(layer.outputs)
            matrix = torch.zeros((1, rows, padded(layer.inputs)), dtype=head[layer.weight].dtype)
            matrix[0, : layer.outputs, : layer.inputs] = head[layer.weight]
            matrix[0, : layer.outputs, layer.inputs] = head[layer.bias]
            stacked.append(matrix.to(device))
        return stacked

    def unstack(self, stack: Stack) -> Tensors:
        """Matrices as weights [clients, outputs, inputs] and biases [clients, outputs] on the CPU."""
        tensors: Tensors = {}
        for layer, matrix in zip(self.layers, stack, strict=True):
            used = matrix[:, : layer.outputs]
            tensors[layer.weight] = used[:, :, : layer.inputs].cpu().contiguous()
            tensors[layer.bias] = used[:, :, layer.inputs].cpu().contiguous()
        return tensors

    def forward(self, stack: Stack, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's input [clients, batch, padded inputs], and at the end the outputs."""
        values = [inputs]
        for matrix, after in zip(stack, (*self.layers[1:], None), strict=True):
            values.append(torch.bmm(values[-1], matrix.transpose(1, 2)))
            if after is not None:
                values[-1].relu_()
                values[-1][:, :, after.inputs] = 1
        return values

    def output_gradients(
        self, stack: Stack, values: Sequence[torch.Tensor], error: torch.Tensor
    ) -> list[torch.Tensor]:
        """The loss's derivative in each layer's output [clients, batch, outputs], given the last one's."""
        gradients = [error]
        for place in range(len(stack) - 1, 0, -1):
            back = torch.bmm(gradients[0], stack[place]).mul_(values[place] > 0)
            back[:, :, self.layers[place].inputs :] = 0
            gradients.insert(0, back)
        return gradients


@dataclass(frozen=True)
class Loss:
    """A loss given by its derivative.

    `grad` takes outputs [clients, batch, outputs], which it may overwrite, and targets. It returns each
    example's derivative in the outputs, and numbers [clients, batch] from which `value` computes the losses.
    """

    grad: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    value: Callable[[torch.Tensor], torch.Tensor]


def _softmax(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of classes [clients, batch]; the numbers are likelihoods.

    torch's softmax is four times as fast across examples that lie side by side as along ten outputs.
    """
    place = targets.unsqueeze(2)
    error = torch.softmax(outputs.transpose(1, 2).contiguous(), dim=1).transpose(1, 2)
    likelihood = error.gather(2, place)
    error.scatter_(2, place, likelihood - 1)
    return error, likelihood.squeeze(2)


def _negative_log_likelihood(likelihood: torch.Tensor) -> torch.Tensor:
    return -likelihood.clamp_min(torch.finfo(torch.float32).tiny).log_()


def _sigmoid(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy with labels [clients, batch, outputs], the mean over outputs.

    The sigmoid is a softmax of two: torch's own sigmoid has other bits at the end of a tensor, where
    its vectorised loop stops.
    """
    probability = torch.softmax(torch.stack((outputs, torch.zeros_like(outputs)), dim=-1), dim=-1)[..., 0]
    each = outputs.clamp_min(0) - outputs * targets + torch.log1p(torch.exp(-outputs.abs()))
    return (probability - targets) / outputs.shape[2], each.mean(dim=2)


def _squared(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of values [clients, batch, outputs], the mean over outputs."""
    difference = outputs - targets
    return difference * (2 / outputs.shape[2]), difference.square().mean(dim=2)


def identity(value: torch.Tensor) -> torch.Tensor:
    """The `value` of losses whose numbers need no conversion."""
    return value


LOSSES = {
    "softmax": Loss(_softmax, _negative_log_likelihood),
    "sigmoid": Loss(_sigmoid, identity),
    "squared": Loss(_squared, identity),
}
"""Losses equal to torch's cross_entropy, binary_cross_entropy_with_logits and mse_loss, reduction "mean"."""


def squared_norms(values: Sequence[torch.Tensor], error: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared L2 norm of every example's gradient over all layers, [clients, batch]."""
    parts = [e.square().sum(2) * a.square().sum(2) for e, a in zip(error, values[:-1], strict=True)]
    return torch.stack(parts).sum(0)


def gradients(values: Sequence[torch.Tensor], error: Sequence[torch.Tensor], out: Stack) -> None:
    """Write the sums of the examples' gradients to `out`, shaped as the stack."""
    for e, a, matrix in zip(error, values[:-1], out, strict=True):
        torch.bmm(e.transpose(1, 2), a, out=matrix)


def sgd_step_(stack: Stack, values: Sequence[torch.Tensor], error: Sequence[torch.Tensor], lr: float) -> None:
    """Take a plain SGD step in the stack, without storing its gradient."""
    for e, a, matrix in zip(error, values[:-1], stack, strict=True):
        matrix.baddbmm_(e.transpose(1, 2), a, alpha=-lr)
