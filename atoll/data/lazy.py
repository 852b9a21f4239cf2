"""Sequences that look a value up when it is needed, and hold nothing in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from atoll.data.dataset import Dataset


@dataclass(frozen=True)
class LazyRows(Sequence[Any]):
    """Some rows of a lookup, in the order given."""

    lookup: Callable[[int], Any]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return LazyRows(self.lookup, self.rows[place])
        return self.lookup(self.rows[place])


@dataclass(frozen=True)
class LazyColumn:
    """Converted cells of one column of a dataset, by row."""

    dataset: Dataset
    column: str
    convert: Callable[[Any], Any]

    def __call__(self, row: int) -> Any:
        return self.several([row])[0]

    def several(self, rows: Sequence[int]) -> list[Any]:
        """Those rows' cells: asked for together, which costs little more than one of them."""
        return [self.convert(cell) for cell in self.dataset.several(self.column, rows)]


def take(values: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    """Those places of a sequence, in that order, looked up when they are needed."""
    if isinstance(values, LazyRows):
        return LazyRows(values.lookup, tuple(values.rows[place] for place in places))
    return LazyRows(values.__getitem__, tuple(places))


def take_many(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """The values at those places, in that order: looked up at once where they are cells of a dataset."""
    if isinstance(values, LazyRows) and isinstance(values.lookup, LazyColumn) and places:
        return values.lookup.several([values.rows[place] for place in places])
    return [values[place] for place in places]
