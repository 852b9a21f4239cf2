"""`generated-shop`: what customers of ten shops buy, one thing after another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.protocol.random_streams import stream_seed

CATEGORIES = {
    "garden": ("rake", "hose", "spade", "flower pot", "hedge trimmer"),
    "kitchen": ("frying pan", "bread knife", "kettle", "mixing bowl", "toaster"),
    "sports": ("tennis racket", "football", "yoga mat", "running shoes", "swimming goggles"),
    "books": ("crime novel", "cookbook", "travel guide", "atlas", "picture book"),
    "music": ("guitar", "drum", "violin", "microphone", "loudspeaker"),
    "toys": ("wooden train", "puzzle", "teddy bear", "board game", "kite"),
    "clothes": ("raincoat", "jumper", "scarf", "trousers", "summer dress"),
    "office": ("desk lamp", "notebook", "fountain pen", "stapler", "office chair"),
    "tools": ("hammer", "drill", "screwdriver", "saw", "tape measure"),
    "camping": ("tent", "sleeping bag", "camping stove", "backpack", "torch"),
    "pets": ("dog lead", "cat basket", "bird cage", "fish tank", "chew toy"),
    "bath": ("towel", "soap dish", "shower curtain", "hair dryer", "toothbrush"),
}
_KINDS = ("red", "blue", "small", "large", "light", "classic", "folding", "soft")
SHOPS = 10
USERS_PER_SHOP = 80
ITEMS = 200
_TEST_USERS = 12
_FOLLOWERS = 3
# Of 100 purchases 60 follow from the last one, 30 are to the customer's taste, the rest is what sells.
_FOLLOWS, _TO_TASTE = 0.6, 0.3
_OPENING = 1_672_531_200
_HOUR = 3600

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Stock:
    """All items: what they are called, their categories, how well they sell, and what each leads to."""

    texts: tuple[str, ...]
    categories: NDArray[np.int64]
    popularity: Floats
    followers: NDArray[np.int64]


def generated_shop(seed: int = 0) -> dict[str, pa.Table]:
    """A row a purchase: columns user, shop, item, time (seconds since 1970), item_text and category.

    Nobody buys a thing twice, and every history has 8 to 30 purchases in order of time. The test split has
    other users of the same shops.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-shop"))
    stock = _stock(rng)
    split: dict[str, list[tuple[str, str, int, int]]] = {"train": [], "test": []}
    for shop in range(SHOPS):
        usual = rng.dirichlet(np.full(len(CATEGORIES), 0.8))
        for user in range(USERS_PER_SHOP):
            name = f"user-{shop * USERS_PER_SHOP + user:03d}"
            times = _OPENING + np.cumsum(rng.integers(1, 24 * 14, 30)) * _HOUR
            for item, time in zip(_history(stock, usual, rng), times.tolist(), strict=False):
                part = "test" if user >= USERS_PER_SHOP - _TEST_USERS else "train"
                split[part].append((name, f"shop-{shop}", item, time))
    return {name: _table(rows, stock) for name, rows in split.items()}


def _stock(rng: np.random.Generator) -> _Stock:
    names = list(CATEGORIES)
    everything = [
        (f"{kind} {noun}", c) for c, name in enumerate(names) for noun in CATEGORIES[name] for kind in _KINDS
    ]
    chosen = np.sort(rng.choice(len(everything), ITEMS, replace=False))
    categories = np.array([everything[i][1] for i in chosen])
    popularity = 1 / rng.permutation(np.arange(1, ITEMS + 1)) ** 0.7
    followers = np.zeros((ITEMS, _FOLLOWERS), dtype=np.int64)
    for item in range(ITEMS):
        # Most leads stay within a category, the last one leads anywhere.
        alike = np.flatnonzero((categories == categories[item]) & (np.arange(ITEMS) != item))
        followers[item, :-1] = rng.choice(alike, _FOLLOWERS - 1, replace=False)
        followers[item, -1] = rng.integers(ITEMS)
    return _Stock(tuple(everything[i][0] for i in chosen), categories, popularity, followers)


def _history(stock: _Stock, usual: Floats, rng: np.random.Generator) -> list[int]:
    """Items in the order in which one user of a shop with the `usual` tastes buys them."""
    taste = rng.dirichlet(0.2 + 4 * usual)[stock.categories] * stock.popularity
    bought = [int(rng.choice(ITEMS, p=taste / taste.sum()))]
    for _ in range(rng.integers(8, 31) - 1):
        way = rng.random()
        weights = np.zeros(ITEMS)
        if way < _FOLLOWS:
            weights[stock.followers[bought[-1]]] = 1
        elif way < _FOLLOWS + _TO_TASTE:
            weights = taste.copy()
        weights[bought] = 0
        if weights.sum() == 0:
            weights = stock.popularity.copy()
            weights[bought] = 0
        bought.append(int(rng.choice(ITEMS, p=weights / weights.sum())))
    return bought


def _table(rows: list[tuple[str, str, int, int]], stock: _Stock) -> pa.Table:
    names = list(CATEGORIES)
    users, shops, items, times = zip(*rows, strict=True)
    return pa.table(
        {
            "user": pa.array(users, pa.string()),
            "shop": pa.array(shops, pa.string()),
            "item": pa.array([f"item-{item:03d}" for item in items], pa.string()),
            "time": pa.array(times, pa.int64()),
            "item_text": pa.array([stock.texts[item] for item in items], pa.string()),
            "category": pa.array([names[stock.categories[item]] for item in items], pa.string()),
        }
    )
