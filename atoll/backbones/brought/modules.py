"""What a backbone of one's own derives from: a torch module, and what is to be known of it.

`docs/extend.md` has a whole example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from atoll.backbones.encoder import Preprocessed


class _Backbone(nn.Module):
    width: int
    """How many features an example has."""

    pretrained: ClassVar[str | bool] = False
    """Where `backbone.weights = "pretrained"` comes from.

    The name of a file beside the class's own, `.safetensors` or torch's, with the module's state dict; True
    where the class loads them as it is made; False where there are none.
    """


class ImageBackbone(_Backbone):
    """Derive from it, say `width` and `forward`; a job names it in `backbone.name`.

    `forward(pixels)` takes [batch, 3, size, size] in float32 and returns features [batch, width] in float32.
    A row of features must depend on its own image alone, and on no random draw while the module is in eval
    mode. Weights are drawn from torch's global generator, which the job seeds.
    """

    image_size: int = 224
    """The side of the squares that it takes, in pixels, where the job has no `backbone.image_size`."""
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    """Of each colour: pixels from 0 to 1, minus the mean, divided by `std`."""


class TextBackbone(_Backbone):
    """Derive from it, say `width`, `prepare` and `forward`; a job names it in `backbone.name`.

    `forward` takes what `prepare` returned for each text, stacked to [batch, …]: as its only argument, or by
    name where that is a dictionary. It returns features [batch, width] in float32. A row must depend on its
    own text alone, and on no random draw while the module is in eval mode.
    """

    def prepare(self, text: str) -> Preprocessed:
        """A text as a tensor, or a dictionary of tensors: of the same shapes and types for every text."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")
