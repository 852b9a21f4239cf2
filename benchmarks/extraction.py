"""What channels_last and torch.compile gain when features are extracted, and what their first call costs.

MobileNetV2 at 96 pixels from JPEGs of 256 x 256, MiniLM at 64 tokens; preparation included, as many
workers as cores, one thread each. Settings take turns, a repetition each, and the table gives medians.
"by one thread" prepares all batches in one thread and only computes in the workers.

    python -m benchmarks.extraction [--repeats 5] [--examples 256]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Variation
from atoll.backbones.extract import BATCH, extract
from atoll.backbones.resolve import resolve
from atoll.backbones.text import load_text_encoder
from atoll.backbones.vision import load_vision_encoder
from atoll.job.job import BackboneSection
from atoll.learning.compiled import CompiledEncoder

WORDS = ("federated", "island", "lagoon", "reef", "the", "of", "and", "measures", "tide", "every", "seven")


def images(count: int) -> list[bytes]:
    """JPEGs of smooth noise."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        file = BytesIO()
        small.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def texts(count: int) -> list[str]:
    """Texts that are cut to 64 tokens."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 70)) for _ in range(count)]


class PreparedByOne(Encoder):
    """An encoder whose batches are prepared by the thread that asks for them."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model, self.width, self._encoder = encoder.model, encoder.width, encoder

    def forward(self, batch: Batch) -> torch.Tensor:
        """What the encoder says."""
        features: torch.Tensor = self._encoder(batch)
        return features

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterator[FixedBatch]:
        for rows, prepare in self._encoder.fixed_batches(inputs, size, variation):
            batch = prepare()
            yield rows, partial(_itself, batch)


def _itself(batch: Batch) -> Batch:
    return batch


@dataclass
class Setting:
    """One way to extract, and the seconds that it took."""

    name: str
    encoder: Encoder
    first: float = 0.0
    again: float = 0.0
    seconds: list[float] = field(default_factory=list)


def vision(*, channels_last: bool = False) -> Encoder:
    section = BackboneSection(name="torchvision:mobilenet_v2", image_size=96, channels_last=channels_last)
    return load_vision_encoder(resolve(section, 1), section, 1)


def text() -> Encoder:
    section = BackboneSection(name="hf:all-MiniLM-L6-v2", max_tokens=64)
    return load_text_encoder(resolve(section, 1), section, 1)


def settings(kind: str) -> list[Setting]:
    """All settings that there are for a kind of input."""
    if kind == "text":
        return [
            Setting("plain", text()),
            Setting("plain, prepared by one thread", PreparedByOne(text())),
            Setting("compiled", CompiledEncoder(text())),
        ]
    return [
        Setting("plain", vision()),
        Setting("plain, prepared by one thread", PreparedByOne(vision())),
        Setting("channels_last", vision(channels_last=True)),
        Setting("compiled", CompiledEncoder(vision())),
        Setting("both", CompiledEncoder(vision(channels_last=True))),
    ]


def timed(encoder: Encoder, inputs: Sequence[Any]) -> float:
    """Seconds of one extraction."""
    start = time.perf_counter()
    extract(encoder, inputs, threads=1, device="cpu")
    return time.perf_counter() - start


def measured(kind: str, inputs: Sequence[Any], repeats: int) -> list[Setting]:
    """First calls one after the other, each compiled anew; then the settings in turns."""
    ways = settings(kind)
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            torch._dynamo.reset()
            way.first = timed(way.encoder, inputs[:BATCH])
            torch._dynamo.reset()
            way.again = timed(way.encoder, inputs[:BATCH])
    for way in ways:
        timed(way.encoder, inputs[:BATCH])
    for _ in range(repeats):
        for way in ways:
            way.seconds.append(timed(way.encoder, inputs))
    return ways


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=256)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    made: dict[str, tuple[str, Sequence[Any]]] = {
        "MobileNetV2 at 96 pixels": ("image", images(options.examples)),
        "MiniLM at 64 tokens": ("text", texts(options.examples)),
    }
    print(f"{cores} cores, {options.repeats} repetitions of {options.examples} examples, medians")
    print(f"{'':32}{'examples/s a core':>18}{'to plain':>10}{'first call, s':>15}{'again, s':>10}")
    for title, (kind, inputs) in made.items():
        print(title)
        ways = measured(kind, inputs, options.repeats)
        plain = statistics.median(ways[0].seconds)
        for way in ways:
            seconds = statistics.median(way.seconds)
            speed = len(inputs) / seconds / cores
            print(
                f"  {way.name:30}{speed:18.1f}{plain / seconds:9.2f}x{way.first:15.2f}{way.again:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
