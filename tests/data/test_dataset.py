"""One owner's rows: what Hugging Face's datasets say of the same table, and nothing copied."""

from __future__ import annotations

import pickle
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.dataset import Dataset

COLUMNS: dict[str, list[Any]] = {
    "text": [f"text {i}" for i in range(700)],
    "label": ["abc"[i % 3] for i in range(700)],
    "boxes": [[[float(i), 1.0]] * (i % 3) for i in range(700)],
    "image": [{"bytes": bytes([i % 256]), "path": None} for i in range(700)],
    "stars": [None if i % 5 == 0 else i for i in range(700)],
}


@pytest.fixture(scope="module")
def theirs() -> datasets.Dataset:
    return datasets.Dataset.from_dict(COLUMNS)


@pytest.fixture(scope="module")
def ours() -> Dataset:
    """In chunks of several sizes, one of them empty."""
    table = pa.table(COLUMNS)
    parts = [table.slice(0, 3), table.slice(0, 0), table.slice(3, 400), table.slice(403)]
    return Dataset(pa.concat_tables(parts))


def test_a_dataset_says_what_hugging_faces_says_of_the_same_rows(
    ours: Dataset, theirs: datasets.Dataset
) -> None:
    assert (len(ours), ours.num_rows, ours.column_names) == (700, 700, theirs.column_names)
    assert ours["label"] == theirs["label"][:] and ours[:] == theirs[:] and list(ours) == list(theirs)
    assert ours[402] == theirs[402] and ours[[403, 2, 2]] == theirs[[403, 2, 2]] and ours[5:9] == theirs[5:9]
    assert ours.select_columns(["label", "stars"])[:] == theirs.select_columns(["label", "stars"])[:]


@given(st.lists(st.integers(0, 699), max_size=20), st.data())
def test_a_selection_of_a_selection_is_theirs(
    ours: Dataset, theirs: datasets.Dataset, rows: list[int], data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)) if rows else []
    mine, other = ours.select(rows).select(again), theirs.select(rows).select(again)
    assert len(mine) == len(again) and mine["text"] == other["text"][:] and list(mine) == list(other)


def test_a_selection_holds_numbers_of_rows_and_does_not_change_with_them(ours: Dataset) -> None:
    rows = np.array([4, 1])
    chosen = ours.select(rows)
    rows[:] = 0
    assert chosen["text"] == ["text 4", "text 1"] and chosen.table is ours.table


def test_a_dataset_travels_to_another_process(ours: Dataset) -> None:
    assert list(pickle.loads(pickle.dumps(ours.select([3, 500])))) == [ours[3], ours[500]]


@pytest.mark.parametrize("rows", [[2], [-1], [0, 5]])
def test_a_row_that_is_not_there_is_an_error(ours: Dataset, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="expected 0 to 1"):
        ours.select([7, 8]).several("text", rows)


def test_a_column_that_is_not_there_is_an_error(ours: Dataset) -> None:
    with pytest.raises(KeyError):
        ours["tokens"]
