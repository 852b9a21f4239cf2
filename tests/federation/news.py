"""Generated texts for a text job: words of two topics, in a CSV."""

import csv
import random
from pathlib import Path


def news_file(path: Path, count: int = 120) -> Path:
    """A CSV of `count` generated texts with labels `good` and `bad`; the file's path."""
    draw = random.Random(4)
    words = {"good": ["good", "a b", "abc"], "bad": ["bad", "x y", "xyz"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(count):
            label = ("good", "bad")[number % 2]
            writer.writerow([" ".join(draw.choice(words[label]) for _ in range(draw.randint(2, 9))), label])
    return path
