"""A column of a dataset, read row by row when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LazyInputs(Sequence[Any]):
    """Converted cells of one column, in the order of `rows`; nothing is held in memory."""

    dataset: datasets.Dataset
    column: str
    rows: tuple[int, ...]
    convert: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return LazyInputs(self.dataset, self.column, self.rows[place], self.convert)
        return self.convert(self.dataset[self.rows[place]][self.column])
