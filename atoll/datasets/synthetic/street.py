"""`generated-street`: what a driving camera sees, by day, at night and in rain, drawn in a few figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.datasets.synthetic.drawing import (
    SIDE,
    Pixels,
    Region,
    as_bytes,
    box_column,
    box_of,
    cut,
    ellipse,
    image_column,
    rectangle,
)
from atoll.datasets.synthetic.png import grey_png, rgb_png
from atoll.protocol.random_streams import stream_seed

WEATHER = ("day", "night", "rain")
OBJECTS = ("car", "pedestrian", "sign")
MASK_CLASSES = ("background", "road", *OBJECTS)
_HORIZON = 34
_TRIES = 30

Part = tuple[Callable[[], Region], tuple[float, float, float]]
Mask = NDArray[np.uint8]


def generated_street(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Scenes with one to four objects: columns image, label (the weather), boxes, classes and mask."""
    rng = np.random.default_rng(stream_seed(seed, "generated-street"))
    images, labels, boxes, classes, masks = [], [], [], [], []
    for _ in range(count):
        label = WEATHER[rng.integers(len(WEATHER))]
        pixels, regions, mask = _scene(label, rng)
        images.append(rgb_png(as_bytes(pixels)))
        labels.append(label)
        boxes.append([box_of(region) for _, region in regions])
        classes.append([name for name, _ in regions])
        masks.append(grey_png(mask))
    return cut(
        pa.table(
            {
                "image": image_column(images),
                "label": pa.array(labels, pa.string()),
                "boxes": box_column(boxes),
                "classes": pa.array(classes, pa.list_(pa.string())),
                "mask": image_column(masks),
            }
        )
    )


def _scene(weather: str, rng: np.random.Generator) -> tuple[Pixels, list[tuple[str, Region]], Mask]:
    """(what is seen, the objects, for each pixel its place in `MASK_CLASSES`)."""
    pixels, road = _road(rng)
    mask = road.astype(np.uint8) * MASK_CLASSES.index("road")
    taken = np.zeros((SIDE, SIDE), dtype=np.bool_)
    regions: list[tuple[str, Region]] = []
    wanted = rng.integers(1, 5)
    for _ in range(_TRIES):
        name = OBJECTS[rng.integers(len(OBJECTS))]
        parts = _OBJECTS[name](rng)
        if len(regions) == wanted:
            continue  # what is drawn later depends on how many numbers were drawn here
        covered = [figure() for figure, _ in parts]
        region = np.logical_or.reduce(covered)
        if not (taken & region).any():
            for part, (_, colour) in zip(covered, parts, strict=True):
                pixels[part] = colour
            x1, y1, x2, y2 = box_of(region)
            taken |= rectangle((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1 + 4, y2 - y1 + 4)
            regions.append((name, region))
            mask[region] = MASK_CLASSES.index(name)
    return _WEATHER[weather](pixels, rng) + rng.normal(0, 6, pixels.shape), regions, mask


def _road(rng: np.random.Generator) -> tuple[Pixels, Region]:
    """Sky, grass, and a road with its middle line that runs to the horizon; which pixels are road."""
    pixels, road = np.zeros((SIDE, SIDE, 3)), np.zeros((SIDE, SIDE), dtype=np.bool_)
    pixels[:_HORIZON] = rng.normal((140, 185, 235), 10)
    pixels[_HORIZON:] = rng.normal((85, 140, 75), 10)
    middle = rng.uniform(40, 56)
    for row in range(_HORIZON, SIDE):
        near = (row - _HORIZON) / (SIDE - _HORIZON)
        half = 4 + 44 * near
        left, right = max(0, round(middle - half)), min(SIDE, round(middle + half))
        pixels[row, left:right] = 105
        road[row, left:right] = True
        if row // 6 % 2:
            pixels[row, round(middle - near) : round(middle + near) + 1] = 230
    return pixels, road


def _car(rng: np.random.Generator) -> list[Part]:
    width = rng.uniform(16, 32)
    height = width * 0.55
    x, y = rng.uniform(width / 2 + 1, SIDE - width / 2 - 1), rng.uniform(48, SIDE - height / 2 - 2)
    red, green, blue = rng.uniform(20, 235, 3)
    wheels = [
        partial(ellipse, x + side * width * 0.3, y + height * 0.36, width * 0.22, width * 0.22)
        for side in (-1, 1)
    ]
    return [
        (partial(rectangle, x, y + height * 0.1, width, height * 0.5), (red, green, blue)),
        (partial(rectangle, x, y - height * 0.3, width * 0.6, height * 0.4), (red, green, blue)),
        (partial(rectangle, x, y - height * 0.28, width * 0.48, height * 0.26), (190, 220, 235)),
        *((wheel, (15.0, 15.0, 15.0)) for wheel in wheels),
    ]


def _pedestrian(rng: np.random.Generator) -> list[Part]:
    height = rng.uniform(18, 34)
    x, y = rng.uniform(8, SIDE - 8), rng.uniform(46, SIDE - height / 2 - 2)
    red, green, blue = rng.uniform(20, 235, 3)
    legs = [
        (
            partial(rectangle, x + side * height * 0.08, y + height * 0.33, height * 0.1, height * 0.32),
            (30.0, 30.0, 60.0),
        )
        for side in (-1, 1)
    ]
    return [
        *legs,
        (partial(rectangle, x, y - height * 0.03, height * 0.3, height * 0.42), (red, green, blue)),
        (partial(ellipse, x, y - height * 0.36, height * 0.24, height * 0.24), (225, 180, 150)),
    ]


def _sign(rng: np.random.Generator) -> list[Part]:
    size = rng.uniform(11, 18)
    x, y = rng.uniform(size, SIDE - size), rng.uniform(20, 50)
    return [
        (partial(rectangle, x, y + size * 1.1, 2.5, size * 1.4), (120, 120, 125)),
        (partial(ellipse, x, y, size, size), (215, 25, 30)),
        (partial(ellipse, x, y, size * 0.62, size * 0.62), (245, 245, 245)),
    ]


def _day(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return pixels * rng.uniform(0.9, 1.1)


def _night(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Dark and blue, but for the cone of the headlights."""
    depth = np.linspace(0, 1, SIDE)[:, None]
    across = np.abs(np.linspace(-1, 1, SIDE))[None, :]
    light = 0.3 + 0.4 * np.clip(depth - across * 0.6, 0, 1)
    dark: Pixels = pixels * light[:, :, None] * np.array([0.85, 0.9, 1.15]) * rng.uniform(0.85, 1.15)
    return dark


def _rain(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Grey, with slanting streaks."""
    grey = pixels.mean(axis=2, keepdims=True)
    wet: Pixels = (0.45 * pixels + 0.4 * grey) * rng.uniform(0.8, 1.0)
    for x, y, length in zip(
        rng.integers(0, SIDE - 4, 45), rng.integers(0, SIDE - 10, 45), rng.integers(4, 10, 45), strict=True
    ):
        rows = np.arange(y, y + length)
        wet[rows, x + (rows - y) // 3] += 60
    return wet


_OBJECTS = {"car": _car, "pedestrian": _pedestrian, "sign": _sign}
_WEATHER = {"day": _day, "night": _night, "rain": _rain}
