"""SegFormer (Xie et al. 2021): a transformer with features at four scales, and a head on all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from atoll.backbones.checkpoint import config_of, load_transformer, mark_fresh
from atoll.backbones.resolve import Backbone, is_run_checkpoint
from atoll.backbones.vision import normalisation_of
from atoll.errors import WeightsError
from atoll.protocol.random_streams import global_stream

_KIND = "segformer"


def load_segformer(backbone: Backbone, classes: int, seed: int) -> tuple[Any, list[float], list[float]]:
    """(the network in eval mode, the means by channel, the standard deviations by channel) for its inputs.

    The head, `decode_head`, has a last layer for `classes` classes: the checkpoint's own if it has that many,
    else a new one. An encoder without a head gets a new head.

    Raises:
        WeightsError: the network is no SegFormer, or its weights don't fit.
    """
    config = config_of(backbone)
    if config.model_type != _KIND:
        raise WeightsError(f"{backbone.folder}: {config.model_type} does not segment, expected {_KIND}")
    if backbone.weights is not None and is_run_checkpoint(backbone.weights):
        config.num_labels = classes
    network = load_transformer(
        backbone, seed, "AutoModelForSemanticSegmentation", config=config, fresh=("decode_head.",)
    )
    if network.config.num_labels != classes:
        with global_stream(seed, "init", "head"):
            last = network.decode_head.classifier
            network.decode_head.classifier = nn.Conv2d(last.in_channels, classes, 1)
        mark_fresh(network, "decode_head.classifier")
    mean, std = normalisation_of(backbone)
    return network.eval(), mean, std
