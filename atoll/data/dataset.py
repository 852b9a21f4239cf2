"""One owner's rows in canonical columns, on Arrow tables alone.

Hugging Face's datasets would do as well, and takes as long to import as torch: it stays for what only it
reads, the data sets that it saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ROWS_IN_MEMORY = 256
"""Rows that are in memory at a time, where all are gone through."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of a table, or those of them that were selected, in the order given; it never changes.

    Cells are looked up when they are asked for, so that a file that is mapped into memory stays there.
    """

    table: pa.Table
    chosen: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self.table.num_rows if self.chosen is None else len(self.chosen)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self)

    @property
    def column_names(self) -> list[str]:
        """What the columns are called, in order."""
        names: list[str] = self.table.column_names
        return names

    @property
    def schema(self) -> pa.Schema:
        """The columns' names and types."""
        return self.table.schema

    @overload
    def __getitem__(self, of: str) -> list[Any]: ...
    @overload
    def __getitem__(self, of: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, of: slice | Sequence[int]) -> dict[str, list[Any]]: ...
    def __getitem__(self, of: str | int | slice | Sequence[int]) -> Any:
        """A column by its name, a row by its place, or the columns of several rows."""
        if isinstance(of, str):
            return list(self.cells(of))
        if isinstance(of, int | np.integer):
            return {name: self.several(name, [int(of)])[0] for name in self.column_names}
        rows = range(len(self))[of] if isinstance(of, slice) else of
        return {name: self.several(name, rows) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, each with its cells by column."""
        names = self.column_names
        for cells in zip(*(self.cells(name) for name in names), strict=True):
            yield dict(zip(names, cells, strict=True))

    def cells(self, name: str) -> Iterator[Any]:
        """A column's cells in order, a few hundred in memory at a time."""
        for start in range(0, len(self), ROWS_IN_MEMORY):
            yield from self.several(name, range(start, min(start + ROWS_IN_MEMORY, len(self))))

    def several(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Some rows' cells of a column.

        Raises:
            IndexError: there is no such row. KeyError: there is no such column.
        """
        places = np.asarray(rows, dtype=np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < len(self)):
            raise IndexError(f"rows from {places.min()} to {places.max()}, expected 0 to {len(self) - 1}")
        return _cells(self.table.column(name), places if self.chosen is None else self.chosen[places])

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Dataset:
        """Those rows, in that order; nothing is copied but their numbers."""
        places = np.array(rows, dtype=np.int64)
        return Dataset(self.table, places if self.chosen is None else self.chosen[places])

    def select_columns(self, names: Sequence[str]) -> Dataset:
        """All rows with those columns alone."""
        return Dataset(self.table.select(list(names)), self.chosen)


def _cells(column: pa.ChunkedArray, places: NDArray[np.int64]) -> list[Any]:
    """Cells of a column, by chunk: a column as a whole may be more than Arrow can take at once."""
    if column.num_chunks == 1:
        cells: list[Any] = _taken(column.chunk(0), places).to_pylist()
        return cells
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    owner = np.searchsorted(ends, places, side="right")
    cells = [None] * len(places)
    for number in np.unique(owner).tolist():
        chunk = column.chunk(number)
        mine = np.flatnonzero(owner == number)
        inside = places[mine] - (ends[number] - len(chunk))
        for place, cell in zip(mine.tolist(), _taken(chunk, inside).to_pylist(), strict=True):
            cells[place] = cell
    return cells


def _taken(chunk: pa.Array, places: NDArray[np.int64]) -> pa.Array:
    if len(places) < 2 or (np.diff(places) == 1).all():
        return chunk.slice(places[0] if len(places) else 0, len(places))
    # Not pa.array(places), which imports pandas to see whether they are its own.
    return chunk.take(pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)]))
