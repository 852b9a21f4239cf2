"""`generated-shapes`: circles, squares and triangles on noise, with their boxes and their pixels."""

from __future__ import annotations

from dataclasses import dataclass

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
    triangle,
)
from atoll.datasets.synthetic.png import grey_png, rgb_png
from atoll.protocol.random_streams import stream_seed

SHAPES = ("circle", "square", "triangle")
MASK_CLASSES = ("background", *SHAPES)
_FIGURES = {"circle": ellipse, "square": rectangle, "triangle": triangle}
_CONTRAST = 90
_TRIES = 30


@dataclass(frozen=True)
class Scene:
    """An image, what is on it, and for each pixel its place in `MASK_CLASSES`."""

    pixels: NDArray[np.uint8]
    regions: tuple[Region, ...]
    classes: tuple[str, ...]

    @property
    def mask(self) -> NDArray[np.uint8]:
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        for region, name in zip(self.regions, self.classes, strict=True):
            mask[region] = MASK_CLASSES.index(name)
        return mask


def generated_shapes(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Images of one to four shapes that don't touch: columns image, boxes, classes and mask."""
    rng = np.random.default_rng(stream_seed(seed, "generated-shapes"))
    scenes = [_scene(rng) for _ in range(count)]
    return cut(
        pa.table(
            {
                "image": image_column([rgb_png(scene.pixels) for scene in scenes]),
                "boxes": box_column([[box_of(region) for region in scene.regions] for scene in scenes]),
                "classes": pa.array([list(scene.classes) for scene in scenes], pa.list_(pa.string())),
                "mask": image_column([grey_png(scene.mask) for scene in scenes]),
            }
        )
    )


def _scene(rng: np.random.Generator) -> Scene:
    ground = rng.uniform(30, 225, 3)
    pixels: Pixels = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    taken = np.zeros((SIDE, SIDE), dtype=np.bool_)
    regions: list[Region] = []
    classes: list[str] = []
    wanted = rng.integers(1, 5)
    for _ in range(_TRIES):
        name = SHAPES[rng.integers(len(SHAPES))]
        size = rng.uniform(14, 40)
        x, y = rng.uniform(size / 2 + 1, SIDE - size / 2 - 1, 2)
        colour = _colour_against(ground, rng)
        if len(regions) < wanted and not (taken & rectangle(x, y, size + 4, size + 4)).any():
            region = _FIGURES[name](x, y, size, size)
            pixels[region] = colour
            taken |= region
            regions.append(region)
            classes.append(name)
    noisy = as_bytes(pixels + rng.normal(0, 14, pixels.shape))
    return Scene(noisy, tuple(regions), tuple(classes))


def _colour_against(ground: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A colour that differs from the ground's by enough."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - ground) >= _CONTRAST:
            return colour
