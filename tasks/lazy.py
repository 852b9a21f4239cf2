"""Sequences that look a value up when it is needed, and hold nothing in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Picked(Sequence[Any]):
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
            return Picked(self.lookup, self.rows[place])
        return self.lookup(self.rows[place])


@dataclass(frozen=True)
class Cells:
    """Converted cells of one column of a dataset, by row."""

    dataset: datasets.Dataset
    column: str
    convert: Callable[[Any], Any]

    def __call__(self, row: int) -> Any:
        return self.convert(self.dataset[row][self.column])
