"""Pruning of networks: of single small weights, or of whole units with everything that depends on them.

`magnitude` sets the smallest weights of every layer to zero (Han et al. 2015, "Learning both Weights and
Connections"). `structured` takes inner units out for good: neurons between two linear layers, channels
between two convolutions, found by torch-pruning's graph of dependencies (Fang et al. 2023, "DepGraph").
The choice follows from the weights alone, so that all sites prune the same. The width of the features never
changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.utils import prune as pruning

from atoll.backbones.encoder import Batch, Encoder
from atoll.backbones.resolve import Backbone
from atoll.backbones.text import TextEncoder
from atoll.backbones.vision import VisionEncoder
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection
from atoll.learning.trainable import PRUNING_MASK

Kind = Literal["magnitude", "structured"]
ALIGN = 8
"""The number of remaining units is a multiple of this, for speed."""
INNER_SIZES = ("intermediate_size", "hidden_dim", "ffn_dim", "d_ff")
"""Names, in transformers' configurations, of the inner width of a feed-forward block."""


def pruned(encoder: Encoder, section: BackboneSection, head: nn.Module | None = None) -> Encoder:
    """The encoder after pruning in place by the job's `backbone.prune`; a `head` inside it is not pruned.

    Raises:
        ConfigError: nothing in the encoder can be pruned.
    """
    if section.prune is not None:
        batch = _example(encoder) if section.pruning == "structured" else {}
        leave_out(encoder, section.prune, section.pruning, batch, head, "backbone.prune")
    return encoder


def fingerprinted(backbone: Backbone, section: BackboneSection) -> Backbone:
    """The backbone with a fingerprint that includes the job's pruning."""
    if section.prune is None:
        return backbone
    identity = f"{backbone.fingerprint} without {section.prune!r} {section.pruning}"
    return replace(backbone, fingerprint=hashlib.sha256(identity.encode()).hexdigest())


def leave_out(
    encoder: Encoder, amount: float, kind: Kind, batch: Batch, head: nn.Module | None, key: str
) -> int:
    """Prune the part `amount` of every layer in place; returns how many layers became smaller.

    `batch` holds example inputs, whose way through the network `structured` traces; `key` is the caller's
    name of the amount, for errors.

    Raises:
        ConfigError: no layer can be made smaller.
    """
    parts = set() if head is None else set(head.modules())
    if kind == "magnitude":
        count = _zero_weights(encoder, amount, parts)
    else:
        count = _remove_units(encoder, amount, batch, parts, key)
    if not count:
        raise ConfigError(f"{key}: this network has nothing that {kind} pruning could leave out")
    return count


def _zero_weights(encoder: nn.Module, amount: float, parts: set[nn.Module]) -> int:
    layers = [m for m in encoder.modules() if _has_many_weights(m) and m not in parts]
    for layer in layers:
        weight = cast(nn.Parameter, layer.weight)
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        weight.data = weight.data.contiguous()  # torch flattens it as it lies in memory
        pruning.l1_unstructured(layer, "weight", amount=amount)  # type: ignore[no-untyped-call]
        mask = vars(layer)["_buffers"]["weight_mask"].clone()
        pruning.remove(layer, "weight")  # type: ignore[no-untyped-call]
        weight = cast(nn.Parameter, layer.weight)
        weight.data = weight.data.to(memory_format=layout)
        setattr(layer, PRUNING_MASK, mask)
    return len(layers)


def _has_many_weights(module: nn.Module) -> bool:
    """Whether a layer can be pruned: depthwise convolutions have too few weights per output."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def check_installed(key: str) -> None:
    """Raises ConfigError unless torch-pruning is installed."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{key}: structured pruning needs torch-pruning: pip install 'atoll[prune]'"
        ) from None


def _remove_units(encoder: Encoder, amount: float, batch: Batch, parts: set[nn.Module], key: str) -> int:
    check_installed(key)
    import torch_pruning

    wanted = {p: p.requires_grad for p in encoder.parameters()}
    encoder.requires_grad_(True)  # the graph is followed by autograd
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(
            encoder, example_inputs={"batch": batch}, forward_fn=lambda m, inputs: m(inputs["batch"])
        )
        groups = [g for g in graph.get_all_groups(root_module_types=[nn.Linear, nn.Conv2d]) if _is_inner(g)]
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        widths = {}
        for group in groups:
            if any(item.dep.target.module in parts for item in group):
                continue
            root, width = group[0].dep.target.module, len(group[0].idxs)
            left = min(width, max(ALIGN, -(-round(width * (1 - amount), 6) // ALIGN) * ALIGN))
            smallest = torch.argsort(importance(group), stable=True)[: width - int(left)].tolist()
            if smallest:
                graph.get_pruning_group(root, group[0].dep.handler, sorted(smallest)).prune()
                widths[root] = (width, int(left))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{key}: torch-pruning finds no way through this network: {why}") from None
    finally:
        for p in encoder.parameters():
            p.requires_grad_(wanted.get(p, False))
    _tell_configuration(encoder.model, set(widths.values()))
    return len(widths)


def _is_inner(group: Any) -> bool:
    """Whether one layer alone produces these units and another alone consumes them, without any addition.

    Depthwise convolutions and norms, which act on each unit separately, may lie between.
    """
    makers, takers = 0, 0
    for item in group:
        module, is_output = item.dep.target.module, _makes(item.dep.handler)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            makers += isinstance(module, nn.Embedding | nn.Parameter)
        elif is_output:
            makers += not (isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1)
        else:
            takers += 1
    return makers == 1 and takers > 0


def _makes(handler: Callable[..., Any]) -> bool:
    return "out_channels" in handler.__name__


def _tell_configuration(network: nn.Module, widths: set[tuple[int, int]]) -> None:
    """Write the new inner width into transformers' configuration, if all blocks have the same."""
    config = getattr(network, "config", None)
    if config is None or len(widths) != 1:
        return
    ((before, after),) = widths
    for name in INNER_SIZES:
        if getattr(config, name, None) == before:
            setattr(config, name, after)


def _example(encoder: Encoder) -> Batch:
    """A batch of valid inputs for a network, with arbitrary content."""
    if isinstance(encoder, TextEncoder):
        return encoder.preprocess_and_collate(["one", "two"])
    if isinstance(encoder, VisionEncoder):
        return {"pixel_values": torch.zeros(2, 3, encoder.size, encoder.size)}
    raise ConfigError(
        "backbone.prune_kind: structured pruning is for one encoder of texts or of images,"
        " expected 'magnitude'"
    )
