"""Values that are looked up when needed: in the order asked for, and cells of a dataset at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyColumn, LazyRows, take, take_many


class Counted:
    """A dataset that counts how often it is asked."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.asked = rows, 0

    def several(self, name: str, rows: Sequence[int]) -> list[Any]:
        self.asked += 1
        return self.rows.several(name, rows)


@pytest.fixture
def counted() -> Counted:
    return Counted(Dataset(pa.table({"text": ["a", "b", "c", "d"], "label": [0, 1, 2, 3]})))


def cells(counted: Counted, order: tuple[int, ...]) -> LazyRows:
    return LazyRows(LazyColumn(counted, "text", str.upper), order)  # type: ignore[arg-type]


def test_cells_of_a_dataset_are_asked_for_once(counted: Counted) -> None:
    assert take_many(cells(counted, (3, 1, 0, 2)), [0, 2, 1, 0]) == ["D", "A", "B", "D"]
    assert counted.asked == 1


def test_rows_of_rows_are_still_asked_for_once(counted: Counted) -> None:
    part = take(take(cells(counted, (3, 1, 0, 2)), [1, 2, 3]), [2, 0])
    assert list(part) == ["C", "B"] and counted.asked == 2
    assert take_many(part, [1, 0]) == ["B", "C"] and counted.asked == 3


def test_nothing_is_asked_for_where_there_is_no_place(counted: Counted) -> None:
    assert take_many(cells(counted, (3, 1, 0, 2)), []) == [] and counted.asked == 0


def test_any_other_sequence_is_looked_up_place_by_place() -> None:
    assert take_many("abcd", [3, 0]) == ["d", "a"]
    assert list(take("abcd", [3, 0])) == ["d", "a"]
    assert take_many(take(take("abcd", [3, 0, 1]), [2, 1]), [1, 0]) == ["a", "b"]


def test_a_place_that_is_not_there_is_an_error(counted: Counted) -> None:
    with pytest.raises(IndexError):
        take_many(cells(counted, (3, 1)), [2])
