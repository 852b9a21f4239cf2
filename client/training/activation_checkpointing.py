"""Activations that are computed a second time for the backward pass instead of being kept (Chen et al. 2016).

Memory then holds what goes into each block, and the activations of one block at a time. The second pass
draws the same dropout as the first one, so gradients are the same bits as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from atoll.backbones.encoder import Model
from atoll.learning import trainable


@contextmanager
def activation_checkpointing(model: Model) -> Iterator[None]:
    """Within the block, the backbone's blocks discard activations and compute them again when needed.

    Raises:
        ConfigError: the backbone has no blocks.
    """
    from torch.utils.checkpoint import checkpoint  # brings more than anyone else needs of torch

    blocks = trainable.recomputable(model)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
