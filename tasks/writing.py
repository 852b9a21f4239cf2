"""Write rows back to disk in the formats that the readers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.images import image_bytes

if TYPE_CHECKING:
    import datasets

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"BM": ".bmp", b"GIF8": ".gif", b"RIFF": ".webp"}


def write_texts(dataset: datasets.Dataset, folder: Path) -> None:
    """`data.jsonl`, one row a line, with all columns."""
    folder.mkdir(parents=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for row in dataset:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_images(dataset: datasets.Dataset, folder: Path) -> None:
    """A folder per class with the images' own bytes; Parquet where a class can't name a folder."""
    folder.mkdir(parents=True)
    labels = sorted(set(dataset["label"]))
    if not all(_names_a_folder(label) for label in labels):
        dataset.to_parquet(str(folder / "data.parquet"))
        return
    for label in labels:
        (folder / label).mkdir()
    for number, row in enumerate(dataset):
        data = image_bytes(row["image"])
        (folder / row["label"] / f"{number:07d}{_suffix(data)}").write_bytes(data)


def _names_a_folder(label: str) -> bool:
    return (
        0 < len(label) <= 100
        and not label.startswith(".")
        and label.lower() not in ("train", "test")
        and all(c.isalnum() or c in " -_.,()" for c in label)
        and label == label.strip()
    )


def _suffix(data: bytes) -> str:
    return next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), ".tif")
