"""A backbone that an extension brings: built, looked at, and identified by its code and its tensors."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.backbones.brought.modules import ImageBackbone, SoundBackbone, TextBackbone
from atoll.backbones.brought.names import BACKBONES, check_brought_backbone, identity, options_for
from atoll.errors import ConfigError, WeightsError
from atoll.job.extension_options import checked_options
from atoll.job.job import BackboneSection
from atoll.plugins import BACKBONE_PREFIX, Extension, failure_of, in_one_line
from atoll.protocol.random_streams import global_stream

Module = ImageBackbone | TextBackbone | SoundBackbone
"""What a backbone of an extension is."""
READS: Mapping[type[Module], str] = {ImageBackbone: "images", TextBackbone: "texts", SoundBackbone: "sounds"}


@dataclass(frozen=True)
class Brought:
    """A backbone of an extension as a job asks for it: where its weights are, and what identifies it."""

    name: str
    origin: str
    weights: Path | None
    fingerprint: str


def found_as(section: BackboneSection, seed: int, file: Path | None) -> Brought:
    """Where the weights of an extension's backbone are; `file` is the one that `backbone.weights` names.

    The fingerprint is a hash of the extension's code, its options and all tensors of the network.

    Raises:
        ConfigError: its options don't fit, or it can't be built as it is written.
        WeightsError: the job asks for weights that it doesn't bring.
    """
    extension = extension_of(section.name)
    name = extension.name
    code = identity(extension, "backbone.name")  # before anything of it is built
    if section.weights == "random":
        origin = f"random, seed {seed}"
    elif file is None:
        origin, file = _own_weights(extension)
    else:
        origin = f"file {file}"
    options = options_for(extension, section.options)
    network = built(extension, options, seed, file)
    parts = json.dumps(["norms calibrated", name, code, options], sort_keys=True)
    digest = hashlib.sha256(parts.encode())
    for tensor_name, tensor in sorted({**dict(network.named_buffers()), **network.state_dict()}.items()):
        digest.update(f"\0{tensor_name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return Brought(name, origin, file, digest.hexdigest())


def extension_of(name: str) -> Extension:
    """The extension that brings `plugin:NAME`, imported.

    Raises:
        ConfigError: there is none, or it can't be imported.
    """
    check_brought_backbone(name)
    return BACKBONES[name.removeprefix(BACKBONE_PREFIX)].loaded()


def _own_weights(extension: Extension) -> tuple[str, Path | None]:
    """(where they come from, their file if the class doesn't load them itself)."""
    pretrained = getattr(extension.thing, "pretrained", False)
    if pretrained is True:
        return extension.origin, None
    if not pretrained:
        raise WeightsError(
            f"backbone.weights: {_called(extension)} brings no weights, expected"
            ' "random" or a file (its class says `pretrained` where it does)'
        )
    path = Path(inspect.getfile(extension.thing)).parent / str(pretrained)  # type: ignore[arg-type]
    if not path.is_file():
        raise WeightsError(f"backbone.weights: {_called(extension)} has no file {path}, which it names")
    return f"{extension.origin}, file {path.name}", path


def built(extension: Extension, brought_options: Mapping[str, Any], seed: int, file: Path | None) -> Module:
    """The module in eval mode with its weights, of which nothing but its form has been looked at.

    Raises:
        ConfigError: it raises an error as it is made, or isn't what a backbone is.
        WeightsError: the file doesn't fit it.
    """
    options = checked_options(extension, brought_options, "backbone.options")
    made: list[Any] = []
    with global_stream(seed, "init", "backbone"):
        failure = failure_of(lambda: made.append(extension.thing(*options)))  # type: ignore[misc]
    if failure is not None:
        raise ConfigError(f"backbone.name: {_called(extension)} raised {in_one_line(failure)}") from failure
    network = made[0]
    if not isinstance(network, Module):
        bases = "an ImageBackbone, a TextBackbone or a SoundBackbone of atoll.backbones"
        raise _wrong(extension, bases, type(network).__name__)
    _check_form(extension, network)
    if file is not None:
        from atoll.backbones.checkpoint import (
            load_state_dict_strict,
            load_weights,
        )  # which resolve by this file

        load_state_dict_strict(network, load_weights(file), file)
    return network.eval()


def _check_form(extension: Extension, network: Module) -> None:
    """Raises ConfigError unless its attributes are what they should be."""
    width = getattr(network, "width", None)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise _wrong(extension, "`width`, a whole number of 1 or more", repr(width))
    if isinstance(network, ImageBackbone):
        size = network.image_size
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise _wrong(extension, "`image_size` from 1 to 4096", repr(size))
        for what in ("mean", "std"):
            values = getattr(network, what)
            if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
                raise _wrong(extension, f"`{what}`, three numbers", repr(values))
        if min(network.std) <= 0:
            raise _wrong(extension, "`std` above 0", repr(network.std))
    for name, tensor in network.named_parameters():
        if tensor.dtype != torch.float32:
            raise _wrong(extension, "parameters in float32", f"{name} in {str(tensor.dtype)[6:]}")


def loaded_as(
    kind: type[Module], name: str, options: Mapping[str, Any], seed: int, file: Path | None
) -> Module:
    """The backbone `plugin:NAME` with its weights.

    Raises:
        ConfigError: it isn't one of that kind, or can't be built.
    """
    extension = extension_of(name)
    network = built(extension, options_for(extension, options), seed, file)
    if not isinstance(network, kind):
        reader = next(reads for one, reads in READS.items() if isinstance(network, one))
        raise WeightsError(
            f"backbone.name: {name} reads {reader}, expected a backbone that reads {READS[kind]}"
        )
    return network


def _wrong(extension: Extension, expected: str, actual: str) -> ConfigError:
    return ConfigError(f"backbone.name: {_called(extension)}: expected {expected}, found {actual}")


def _called(extension: Extension) -> str:
    return f"{BACKBONE_PREFIX}{extension.name} ({extension.origin})"


ORDERS = ((0, 1, 2, 3), (0, 3, 3, 1), (2, 0, 1, 3), (3, 1), (0, 1, 2, 3))
"""Which of four examples a batch has, by place; the last is the first again."""


def check_rows(name: str, network: nn.Module, batch: Mapping[str, torch.Tensor], width: int) -> None:
    """See whether features come out in their form, and each example's depend on that example alone.

    `network` takes a batch of four examples, or of some of them, by name.

    Raises:
        ConfigError: the module raises an error, or its features aren't so.
    """
    extension, first, again = extension_of(name), torch.empty(0), torch.empty(0)
    for number, order in enumerate(ORDERS):
        part = {key: t[list(order)] for key, t in batch.items()}
        features = _features(extension, network, part, number)
        if not isinstance(features, torch.Tensor) or features.shape != (len(order), width):
            shape = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise _wrong(extension, f"features [{len(order)}, {width}] of {_forms(part)}", str(shape))
        if features.dtype != torch.float32:
            raise _wrong(extension, "features in float32", str(features.dtype)[6:])
        if not torch.isfinite(features).all():
            raise _wrong(extension, "features that are finite", "others")
        first = features if number == 0 else first
        again = features
        if not torch.allclose(features, first[list(order)], rtol=1e-3, atol=1e-4 * float(first.abs().max())):
            raise _wrong(
                extension,
                "an example's features to depend on it alone",
                "others in another batch, or drawn again",
            )
    if not torch.equal(first, again):
        raise _wrong(extension, "the same features each time", "others the second time")


def _features(
    extension: Extension, network: nn.Module, batch: Mapping[str, torch.Tensor], number: int
) -> torch.Tensor:
    features: list[torch.Tensor] = []
    with torch.no_grad(), global_stream(number, "probe"):
        failure = failure_of(lambda: features.append(network(dict(batch))))
    if failure is not None:
        raise ConfigError(
            f"backbone.name: {_called(extension)} raised {in_one_line(failure)}, given {_forms(batch)}"
        ) from failure
    return features[0]


def _forms(batch: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in batch.items())
