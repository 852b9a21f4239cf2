"""Write rows back to disk in the formats that the readers read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atoll.data.columns import Columns
from atoll.data.dataset import Dataset
from atoll.data.images import image_bytes

SUFFIXES = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"BM": ".bmp", b"GIF8": ".gif", b"fLaC": ".flac",
}  # fmt: skip
ROWS = 256
"""Images of a Parquet file that are in memory at a time."""


def write_texts(dataset: Dataset, folder: Path, columns: Columns) -> None:
    """`data.jsonl`, one row a line, with all columns, named as the job names them."""
    folder.mkdir(parents=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for row in dataset:
            named = {_name(key, columns): _json_value(value) for key, value in row.items()}
            file.write(json.dumps(named, ensure_ascii=False) + "\n")


def write_records(dataset: Dataset, folder: Path, files: Sequence[str], names: Mapping[str, str]) -> None:
    """`data.jsonl` in a new folder, and a folder for each column of files; `names` are by column."""
    folder.mkdir(parents=True)
    for column in files:
        (folder / column).mkdir()
    with (folder / "data.jsonl").open("w", encoding="utf-8") as out:
        for number, row in enumerate(dataset):
            line = {}
            for column, value in row.items():
                if column in files:
                    data = image_bytes(value)
                    place = folder / column / f"{number:07d}{_suffix(data)}"
                    place.write_bytes(data)
                    value = str(place.relative_to(folder))
                line[names.get(column, column)] = _json_value(value)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _name(column: str, columns: Columns) -> str:
    """What the job calls a canonical column; the others keep their names."""
    chosen = getattr(columns, column) if column in ("text", "image", "label") else None
    return chosen or column


def _json_value(value: Any) -> Any:
    """A cell of a column that is not learnt from, as JSON can say it: a date as text, no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {name: _json_value(item) for name, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write_images(dataset: Dataset, folder: Path, columns: Columns) -> None:
    """A folder per class with the images' own bytes; Parquet where a class can't name a folder."""
    folder.mkdir(parents=True)
    labels = sorted(set(dataset["label"]))
    if not all(_names_a_folder(label) for label in labels):
        _write_parquet(dataset, folder / "data.parquet", columns)
        return
    for label in labels:
        (folder / label).mkdir()
    for number, row in enumerate(dataset):
        data = image_bytes(row["image"])
        (folder / row["label"] / f"{number:07d}{_suffix(data)}").write_bytes(data)


def _write_parquet(dataset: Dataset, path: Path, columns: Columns) -> None:
    """All columns, the images as bytes wherever they came from."""
    kinds = {name: dataset.schema.field(name).type for name in dataset.column_names}
    schema = pa.schema([(_name(name, columns), kind) for name, kind in kinds.items()])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(dataset), ROWS):
            rows = [dataset[row] for row in range(start, min(start + ROWS, len(dataset)))]
            cells = {name: [row[name] for row in rows] for name in kinds}
            cells["image"] = [{"bytes": image_bytes(cell), "path": None} for cell in cells["image"]]
            arrays = [pa.array(cells[name], kind) for name, kind in kinds.items()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _names_a_folder(label: str) -> bool:
    return (
        0 < len(label) <= 100
        and not label.startswith(".")
        and label.lower() not in ("train", "test")
        and all(c.isalnum() or c in " -_.,()" for c in label)
        and label == label.strip()
    )


def _suffix(data: bytes) -> str:
    if data.startswith(b"RIFF"):
        return ".wav" if data[8:12] == b"WAVE" else ".webp"
    if data[128:132] == b"DICM":
        return ".dcm"
    return next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), ".tif")
