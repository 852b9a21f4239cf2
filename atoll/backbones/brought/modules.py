"""The base classes of backbones that extensions bring: torch modules with a width and preprocessing.

`docs/extend.md` has a whole example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from atoll.backbones.encoder import Preprocessed
from atoll.data.audio import BANDS, frames_of, spectrogram


class _Backbone(nn.Module):
    width: int
    """How many features an example has: the second dimension of `forward`'s result."""

    pretrained: ClassVar[str | bool] = False
    """Where `backbone.weights = "pretrained"` comes from.

    A string names a file beside the class's own, safetensors or torch's, with the module's state dict. True
    means that `__init__` loads the weights. With False a job cannot ask for pretrained weights.
    """


class ImageBackbone(_Backbone):
    """A backbone for images: derive from it, set `width` and write `forward`.

    A job names it in `backbone.name`, as `plugin:` and the name under which it is registered.
    `forward(pixels)` takes [batch, 3, size, size] in float32 and returns features [batch, width] in float32.
    A row of features must depend on its own image alone, and on no random draw while the module is in eval
    mode. Weights are drawn from torch's global generator, which the job seeds.
    """

    image_size: int = 224
    """The side, in pixels, of the squares that images are cut to; `backbone.image_size` overrides it."""
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    """Subtracted from pixels between 0 and 1: one number each for red, green and blue."""
    std: Sequence[float] = (1.0, 1.0, 1.0)
    """What pixels are divided by after the mean is subtracted, for red, green and blue."""


class TextBackbone(_Backbone):
    """A backbone for texts: derive from it, set `width`, and write `prepare` and `forward`.

    A job names it in `backbone.name`, as `plugin:` and the name under which it is registered. `forward` takes
    what `prepare` returned for each text, stacked to [batch, …]: a tensor as its only argument, a dictionary
    by name. It returns features [batch, width] in float32. A row must depend on its own text alone, and on no
    random draw while the module is in eval mode.
    """

    def prepare(self, text: str) -> Preprocessed:
        """One text as a tensor or a dictionary of tensors, without a batch dimension.

        Names, shapes and dtypes must be the same for every text: pad what is shorter.
        """
        raise NotImplementedError(f"{type(self).__name__}.prepare")


class SoundBackbone(_Backbone):
    """A backbone for recordings: derive from it, set `width` and write `forward`.

    A job names it in `backbone.name`, as `plugin:` and the name under which it is registered. `forward` takes
    what `prepare` returned for each recording, stacked to [batch, …]: a tensor as its only argument, a
    dictionary by name. It returns features [batch, width] in float32. A row must depend on its own recording
    alone, and on no random draw while the module is in eval mode.
    """

    def prepare(self, samples: torch.Tensor, max_seconds: float) -> Preprocessed:
        """One recording as a tensor or a dictionary of tensors, without a batch dimension.

        `samples` is float32 [n], one channel at 16 kHz between -1 and 1, and no longer than `max_seconds`
        (`task.options.max_seconds`). Names, shapes and dtypes must be the same for every recording.

        By default it returns the logarithms of energies [frames, 40] in 40 mel bands, of windows of 25 ms
        every 10 ms, with mean 0 and deviation 1 over the recording, and zeros behind what is shorter than
        `max_seconds`.
        """
        bands = spectrogram(samples.numpy())
        frames = frames_of(max_seconds)
        return torch.cat([bands, bands.new_zeros(max(0, frames - len(bands)), BANDS)])[:frames]
