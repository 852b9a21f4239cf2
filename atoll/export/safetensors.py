"""A trained model without what training needed: LoRA's factors are in the weights that they change."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atoll.backbones.encoder import Model
from atoll.errors import WeightsError
from atoll.learning import directions
from atoll.learning.trainable import contiguous
from atoll.protocol.tensors import Tensors, from_bytes, to_bytes


def adapters(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The layers that have LoRA's factors, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def make_plain(model: nn.Module) -> None:
    """Add LoRA's products to their weights and put the layers themselves back, in place.

    Of weights that lie along directions the coefficients go, and the weights stay.
    """
    directions.make_plain(model)
    for name, layer in adapters(model):
        if isinstance(model, Model):
            model.remember_unmerged(name, layer.get_base_layer())
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def tensors_of(model: nn.Module) -> Tensors:
    """All parameters and buffers that make the model what it is, each once, in the usual layout."""
    seen: set[int] = set()
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue  # the same weight under a second name
        seen.add(tensor.data_ptr())
        tensors[name] = contiguous(tensor.detach()).cpu()
    return tensors


def write_tensors(model: nn.Module, path: Path) -> None:
    """All tensors as one safetensors file."""
    path.write_bytes(to_bytes(tensors_of(model)))


def read_tensors(model: Model, path: Path) -> None:
    """Put a file of `write_tensors` back into a model of the same kind.

    Raises:
        WeightsError: it is of another model.
    """
    stored = from_bytes(path.read_bytes())
    expected = tensors_of(model)
    if stored.keys() != expected.keys():
        raise WeightsError(f"{path}: tensors of another model, differing in {len(stored.keys() ^ expected)}")
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in stored.items():
            state[name].copy_(tensor)
