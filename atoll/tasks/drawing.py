"""Predictions as pictures: masks with a palette, and masks or boxes drawn over the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

OPACITY = 0.5
"""The opacity of a mask's colours over the picture."""
NAMED_FROM = 160
"""The shorter side in pixels from which on a picture has room for the names of classes."""
_BITS = 8


def colour_of(number: int) -> Colour:
    """The RGB colour of a class in PASCAL VOC's palette: 256 different colours, of which 0 is black."""
    red = green = blue = 0
    for bit in range(_BITS):
        red |= (number >> 3 * bit & 1) << 7 - bit
        green |= (number >> 3 * bit + 1 & 1) << 7 - bit
        blue |= (number >> 3 * bit + 2 & 1) << 7 - bit
    return red, green, blue


def hex_colour(number: int) -> str:
    """The colour of a class as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour_of(number))


def mask_png(mask: NDArray[np.uint8]) -> bytes:
    """A PNG with a palette whose pixels are the class indices of a mask, uint8, [height, width]."""
    image = Image.fromarray(mask, "L")
    image.putpalette([value for number in range(256) for value in colour_of(number)])
    return _png(image)


def mask_over(picture: Image.Image, mask: NDArray[np.uint8], classes: Sequence[str]) -> bytes:
    """A PNG of the picture overlaid with the mask's colours, and a legend of the classes in the mask.

    A picture too small for names has no legend.
    """
    colours = np.array([colour_of(number) for number in range(256)], dtype=np.float64)
    mixed = np.asarray(picture) * (1 - OPACITY) + colours[mask] * OPACITY
    image = Image.fromarray(mixed.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(image), _font(image.size)
    top = 0.0
    for number in np.unique(mask).tolist() if min(image.size) >= NAMED_FROM else ():
        top = _name_tag(draw, font, (0.0, top), classes[number], colour_of(number))
    return _png(image)


def boxes_over(picture: Image.Image, boxes: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> bytes:
    """A PNG of the picture with boxes drawn on it, each with its class and score.

    `box` is [x1, y1, x2, y2] as fractions of the picture's width and height.
    """
    image = picture.copy()
    draw, font = ImageDraw.Draw(image), _font(image.size)
    for one in reversed(boxes):  # the surest is drawn last, over the others
        colour = colour_of(1 + classes.index(one["class"]) % 255)
        left, top, right, bottom = (
            part * side for part, side in zip(one["box"], image.size * 2, strict=True)
        )
        draw.rectangle((left, top, right, bottom), outline=colour, width=max(2, max(image.size) // 300))
        tag = f"{one['class']} {one['score']:.2f}"
        height = _height(font, tag)
        _name_tag(draw, font, (left, top - height if top >= height else top), tag, colour)
    return _png(image)


def _name_tag(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    place: tuple[float, float],
    text: str,
    colour: Colour,
) -> float:
    """Write a text on a rectangle of this colour whose upper left corner is `place`; returns its bottom."""
    left, top = place
    end = top + _height(font, text)
    draw.rectangle((left, top, left + font.getlength(text) + 4, end), fill=colour)
    bright = sum(colour) > 3 * 127
    draw.text((left + 2, top + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)
    return end


def _height(font: ImageFont.FreeTypeFont, text: str) -> float:
    return font.getbbox(text)[3] + 3


@cache
def _font(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """A font of a size that fits a picture of this size; it comes with Matplotlib."""
    from matplotlib import get_data_path

    path = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, max(9, min(size) // 30))


def _png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
