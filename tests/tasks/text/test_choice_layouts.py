"""Multiple choice: what is read of each layout and format, and which rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from datasets import Dataset as SavedDataset
from datasets import Sequence as ListOf

from atoll.errors import DataError
from atoll.job.job import DataSection
from atoll.tasks.multiple_choice.task import MULTIPLE_CHOICE

ARC = {"text": ["wind", "sun"], "label": ["A", "B"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ours": {"question": "q", "choices": ["wind", "sun"], "answer": 1},
    "a letter": {"question": "q", "choices": ["wind", "sun"], "answer": "B"},
    "a text": {"question": "q", "choices": ["wind", "sun"], "answer": " sun "},
    "ARC, OpenBookQA": {"id": "7", "question_stem": "q", "choices": ARC, "answerKey": "B"},
    "ARC with numbers": {"question": "q", "choices": ARC | {"label": ["1", "2"]}, "answerKey": "2"},
    "ARC's JSON Lines": {
        "id": "7", "answerKey": "B",
        "question": {"stem": "q", "choices": [{"text": "wind", "label": "A"}, {"text": "sun", "label": "B"}]},
    },
    "HellaSwag": {"ctx_a": "q", "ctx": "q", "endings": ["wind", "sun"], "label": "1"},
    "SWAG": {"startphrase": "q", "sent1": "q", "ending0": "wind", "ending1": "sun", "label": 1},
    "PIQA": {"goal": "q", "sol1": "wind", "sol2": "sun", "label": 1},
    "a column a letter": {"question": "q", "A": "wind", "B": "sun", "answer": "B"},
    "fewer choices than columns": {"question": "q", "A": "wind", "B": "sun", "C": "", "answer": "B"},
}  # fmt: skip


def read(path: Path, options: dict[str, Any] | None = None, **columns: str) -> list[dict[str, Any]]:
    data = DataSection(source="x", columns=columns)
    table = MULTIPLE_CHOICE.read(path, data, options or {}).train
    return [
        {name: table[row][name] for name in ("question", "choices", "answer")} for row in range(len(table))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_from_each_format(tmp_path: Path, layout: str) -> None:
    row, wanted = LAYOUTS[layout], [{"question": "q", "choices": ["wind", "sun"], "answer": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    SavedDataset.from_list([row]).save_to_disk(str(tmp_path / "c"))
    found = [read(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c")]
    if layout != "ARC's JSON Lines":
        cells = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
        pyarrow.csv.write_csv(pa.Table.from_pylist([cells]), tmp_path / "d.csv")
        found.append(read(tmp_path / "d.csv"))
    assert found == [wanted] * len(found)


def test_class_indices_of_a_saved_dataset_are_places(tmp_path: Path) -> None:
    features = Features({
        "question": Value("string"), "choices": ListOf(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    })  # fmt: skip
    rows = [{"question": "q", "choices": ["1", "0", "3", "2"], "answer": 3}]
    SavedDataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "mmlu"))
    assert read(tmp_path / "mmlu") == rows


def test_columns_are_named_by_the_job(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("asked,one,two,right,class\nq,wind,sun,b,7\n")
    named = {"question": "asked", "choices": "one, two", "answer": "right"}
    assert read(tmp_path / "a.csv", **named) == [{"question": "q", "choices": ["wind", "sun"], "answer": 1}]
    data = DataSection(source="x", columns=named)
    table = MULTIPLE_CHOICE.read(tmp_path / "a.csv", data, {}).train
    assert table["class"] == ["7"]
    MULTIPLE_CHOICE.write(table, tmp_path / "again", data)
    again = MULTIPLE_CHOICE.read(tmp_path / "again", data, {}).train
    assert MULTIPLE_CHOICE.keys(again) == MULTIPLE_CHOICE.keys(table)


@pytest.mark.parametrize(("way", "place"), [("text", 0), ("letter", 1)])
def test_an_answer_that_may_mean_two_choices_is_refused_unless_the_job_says_which(
    tmp_path: Path, way: str, place: int
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "choices": ["B", "A"], "answer": "B"}))
    with pytest.raises(
        DataError, match=r"line 1: the answer 'B' may mean choice A or B; expected task\.options"
    ):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", {"answers": way})[0]["answer"] == place
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "choices": ["A", "B"], "answer": "B"}))
    assert read(tmp_path / "b.jsonl")[0]["answer"] == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"choices": ["a", ""], "answer": 0}, "choice B: empty, expected some text"),
        ({"choices": ["a", None], "answer": 0}, "choice B: the text is missing"),
        ({"choices": ["a"], "answer": 0}, "1 choices, expected 2 to 26"),
        ({"choices": ["a"] * 27, "answer": 0}, "27 choices, expected 2 to 26"),
        ({"choices": "a or b", "answer": 0}, "the choices are 'a or b', expected a list such as"),
        ({"choices": ["a", "b"], "answer": 2}, "the answer is number 2, expected 0 to 1"),
        ({"choices": ["a", "b"], "answer": -1}, "the answer is number -1, expected 0 to 1"),
        ({"choices": ["a", "b"], "answer": "C"}, "the answer 'C' names 0 choices, expected the text, letter"),
        ({"choices": ["a", "b"], "answer": ""}, "the answer is nothing, expected a choice"),
        ({"choices": ["a", "b"], "answer": None}, "the answer is nothing, expected a choice"),
        ({"choices": ["a", "b", "b"], "answer": 1}, "the right choice 'b' is there twice, expected once"),
        ({"choices": ARC, "answer": "C"}, "the answer 'C' names 0 choices, expected one of the labels A, B"),
        ({"choices": [{"text": "a"}, {"text": "b"}], "answer": 0}, "expected text and label in each"),
        ({"A": "a", "B": "", "C": "c", "answer": "C"}, "choice B is empty and a later one isn't"),
        ({"answer": 1}, "expected choices .a list., or a column for each"),
        ({"choices": ["a", "b"]}, "expected one for the answer"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_in_one_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q"} | row) + "\n")
    with pytest.raises(DataError, match=problem) as told:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(told.value) and "a.jsonl" in str(told.value)


def test_other_choices_may_be_there_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "choices": ["a", "b", "b"], "answer": 0}))
    assert read(tmp_path / "a.jsonl")[0]["choices"] == ["a", "b", "b"]
