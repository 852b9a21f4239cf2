"""Generated images: a smooth pattern a class, under noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.workload import Array, Workload

SIDE, CLASSES, TEST = 32, 10, 2000


@dataclass(frozen=True)
class Images:
    """8-bit images [examples, side, side, 3] of every client, and a test set."""

    pixels: Array
    targets: Array
    sizes: Array
    test_pixels: Array
    test_targets: Array

    @classmethod
    def make(cls, clients: int, examples: int) -> Images:
        """All clients draw from all classes alike."""
        rng = np.random.default_rng(0)
        patterns = np.stack([smooth(rng) for _ in range(CLASSES)])

        def drawn(count: int) -> tuple[Array, Array]:
            targets = rng.integers(0, CLASSES, count)
            strength = rng.uniform(8, 20, (count, 1, 1, 1))
            noise = 40 * rng.normal(size=(count, SIDE, SIDE, 3))
            pixels = 128 + strength * patterns[targets] + noise
            # A tenth of the labels says nothing, so that a good accuracy is about 0.9 and not 1.
            wrong = rng.random(count) < 0.1
            targets = np.where(wrong, rng.integers(0, CLASSES, count), targets)
            return pixels.clip(0, 255).astype(np.uint8), targets

        pixels, targets = drawn(clients * examples)
        return cls(pixels, targets, np.full(clients, examples), *drawn(TEST))

    def workload(self, *, cohort: int, batch: int, lr: float, rounds: int) -> Workload:
        """As every system gets them: float32 from -1 to 1, channels first."""
        return Workload(
            "cnn", scaled(self.pixels), self.targets, self.sizes, scaled(self.test_pixels),
            self.test_targets, cohort, batch, lr, rounds,
        )  # fmt: skip


def smooth(rng: np.random.Generator) -> Array:
    """A random pattern of a few waves, about 1 in size: [side, side, 3]."""
    grid = np.linspace(0, 2 * np.pi, SIDE)
    down, across = np.meshgrid(grid, grid, indexing="ij")
    waves = [
        rng.normal(size=3) * np.cos(y * down + x * across + rng.uniform(0, 2 * np.pi))[..., None]
        for y in range(3)
        for x in range(3)
    ]
    pattern = np.sum(waves, axis=0)
    found: np.ndarray = pattern / pattern.std()
    return found


def scaled(pixels: Array) -> Array:
    """As the encoder prepares them: mean and deviation .5."""
    return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2))
