"""`generated-reviews`: a customer's photo of a thing and what they write about it; the label needs both."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import SIDE, as_bytes, cut, ellipse, image_column, rectangle, triangle
from atoll.datasets.synthetic.png import rgb_png
from atoll.protocol.random_streams import stream_seed

THINGS = ("ball", "box", "tent")
_FIGURES = {"ball": ellipse, "box": rectangle, "tent": triangle}
VERDICTS = {
    "praise": (
        "I love it, {} works perfectly.", "Great quality, would buy {} again.",
        "Arrived early and {} is lovely.",
        "My children adore {}.", "Excellent, better than expected.", "Very happy with {}, five stars.",
    ),
    "complaint": (
        "It broke after a week, {} is useless.", "Terrible quality, I want my money back.",
        "{} arrived damaged and late.", "Very disappointed, {} fell apart.",
        "Do not buy, {} is a waste of money.",
        "The worst purchase, {} never worked.",
    ),
}  # fmt: skip
_IT = ("it", "this", "the thing", "my order", "this one")


def generated_reviews(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Columns image, text, label (such as "ball complaint") and shop; texts never name the thing."""
    rng = np.random.default_rng(stream_seed(seed, "generated-reviews"))
    rows: dict[str, list[str]] = {"text": [], "label": [], "shop": []}
    images = []
    for number in range(count):
        thing, verdict = THINGS[number % 3], tuple(VERDICTS)[number // 3 % 2]
        sayings = VERDICTS[verdict]
        sentence = sayings[rng.integers(len(sayings))].format(_IT[rng.integers(len(_IT))])
        rows["text"].append(sentence[0].upper() + sentence[1:])
        rows["label"].append(f"{thing} {verdict}")
        rows["shop"].append(f"shop-{rng.integers(10)}")
        images.append(_photo(thing, rng))
    order = rng.permutation(count)
    table = pa.table(
        {"image": image_column(images), **{n: pa.array(v, pa.string()) for n, v in rows.items()}}
    )
    return cut(table.take(pa.array(order)))


def _photo(thing: str, rng: np.random.Generator) -> bytes:
    """The thing somewhere near the middle, bright on dark or dark on bright, on noise."""
    ground, colour = rng.uniform(20, 100, 3), rng.uniform(150, 235, 3)
    if rng.random() < 0.5:
        ground, colour = colour, ground
    size = rng.uniform(40, 70)
    x, y = rng.uniform(size / 2, SIDE - size / 2, 2)
    pixels = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    pixels[_FIGURES[thing](x, y, size, size)] = colour
    return rgb_png(as_bytes(pixels + rng.normal(0, 12, pixels.shape)))
