"""Random augmentation: torchvision's transforms, token dropout, SpecAugment, each from a stream of its own.

Which there are is said in `atoll/backbones/brought/names.py`.

torchvision's own classes draw from torch's one global generator, which threads would share, so
the draws are made here, with their distributions and default ranges, and the functions are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a random crop, as in RandomResizedCrop: its part of the image, its width by its height."""
DEGREES = 15.0
JITTER, HUE = 0.4, 0.1
"""Brightness, contrast and saturation change by up to this factor, hue by this part of the circle."""
DROPPED = 0.1
"""The probability that a token is hidden."""
MASKS, WIDEST_BAND, WIDEST_TIME = 2, 1 / 3, 1 / 5
"""SpecAugment's: how many masks of either kind, and the most of bands and of frames that one hides."""

Frame = tuple[int, int, int, int]
"""Top, left, height, width."""


def framed(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size`, and the square at the centre."""
    if image.size == (size, size):
        return image
    from torchvision.transforms import functional

    image = functional.resize(image, [size], antialias=True)
    square: Image.Image = functional.center_crop(image, [size, size])
    return square


def varied_image(image: Image.Image, size: int, names: Sequence[str], draw: torch.Generator) -> Image.Image:
    """An image of `size` x `size`, varied by the augmentations of these names."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    if "crop" in names:
        frame = crop_frame(image.height, image.width, draw)
        image = functional.resized_crop(image, *frame, [size, size], antialias=True)
    else:
        image = framed(image, size)
    if "rotate" in names:
        angle = _between(-DEGREES, DEGREES, draw)
        image = functional.rotate(image, angle, InterpolationMode.BILINEAR)
    if "flip" in names and _between(0, 1, draw) < 0.5:
        image = functional.horizontal_flip(image)
    return jittered(image, draw) if "color" in names else image


def crop_frame(height: int, width: int, draw: torch.Generator) -> Frame:
    """What RandomResizedCrop cuts out: an area and a ratio at random, somewhere in the image."""
    for _ in range(10):
        area = height * width * _between(*AREA, draw)
        ratio = math.exp(_between(math.log(RATIO[0]), math.log(RATIO[1]), draw))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return _below(height - h + 1, draw), _below(width - w + 1, draw), h, w
    # The image is too long for the ratios: as much of its middle as they allow.
    h = min(height, round(width / RATIO[0]))
    w = min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def jittered(image: Image.Image, draw: torch.Generator) -> Image.Image:
    """As ColorJitter: brightness, contrast, saturation and hue changed, in an order at random."""
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    factors = [_between(1 - JITTER, 1 + JITTER, draw) for _ in changes] + [_between(-HUE, HUE, draw)]
    for change in torch.randperm(4, generator=draw).tolist():
        image = (*changes, functional.adjust_hue)[change](image, factors[change])
    return image


def hidden_tokens(
    ids: Sequence[int], special: Sequence[int], mask: int | None, draw: torch.Generator
) -> list[int]:
    """Tokens of which some are replaced by the mask token, or left out where there is none.

    Special tokens stay, and so does a text of which nothing would be left.
    """
    numbers = torch.rand(len(ids), generator=draw).tolist()
    hit = [number < DROPPED and not s for number, s in zip(numbers, special, strict=True)]
    if mask is not None:
        return [mask if h else i for i, h in zip(ids, hit, strict=True)]
    return [i for i, h in zip(ids, hit, strict=True) if not h] or list(ids)


def masked_spectrum(spectrum: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Log-mel features [frames, bands] with bands and frames hidden by their mean (Park et al. 2019).

    Two masks of each kind, each as wide as an even draw says, up to a third of the bands (27 of 80 in the
    paper) and a fifth of the frames; nothing is warped.
    """
    masked, fill = spectrum.clone(), spectrum.mean()
    for axis, widest in ((1, WIDEST_BAND), (0, WIDEST_TIME)):
        size = spectrum.shape[axis]
        for _ in range(MASKS):
            width = _below(int(size * widest) + 1, draw)
            masked.narrow(axis, _below(size - width + 1, draw), width).fill_(fill)
    return masked


def _between(low: float, high: float, draw: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw, dtype=torch.float64))


def _below(count: int, draw: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=draw))
