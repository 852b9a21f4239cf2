"""One value has one name, whatever file it stands in; and names that look alike are remarked."""

import csv
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.labels import class_name, value_name
from atoll.data.parsers import name_cell
from atoll.errors import DataError
from atoll.job.job import DataSection
from atoll.protocol.messages import DataInfo
from atoll.server.roster import ClientRoster
from atoll.tasks import task_named
from atoll.tasks.classes import named

DAY, NOON = datetime.date(2024, 3, 1), datetime.datetime(2024, 3, 1, 12)

SAME = [
    ("true", [True, "True", "true", "TRUE", " True "]),
    ("false", [False, "False", "false"]),
    ("7", [7, 7.0, "7", "7.0", " 7 "]),
    ("-7", [-7, -7.0, "-7.00"]),
    ("2024-03-01", [DAY, "2024-03-01", datetime.datetime(2024, 3, 1), "2024-03-01 00:00:00"]),
    ("2024-03-01T12:00:00", [NOON, "2024-03-01T12:00:00", "2024-03-01 12:00:00"]),
    ("caf\u00e9", ["caf\u00e9", "cafe\u0301"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values"), SAME)
def test_a_label_an_id_and_a_key_are_named_by_one_rule(name: str, values: list[object]) -> None:
    assert {value_name(value) for value in values} == {name}
    assert {class_name(value, "") for value in values} == {name}
    assert {name_cell(value, "") for value in values} == {name}


@pytest.mark.parametrize("value", [None, float("nan"), "", "   ", "nan", "NULL", "<NA>"])
def test_what_is_missing_has_no_name(value: object) -> None:
    assert value_name(value) is None
    for read in (class_name, name_cell):
        with pytest.raises(DataError, match="line 3"):
            read(value, "d.csv line 3")


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int64(), pa.float64(), pa.date32(), pa.timestamp("ns")])
def test_parquet_and_what_pandas_writes_into_csv_are_the_same_classes(
    tmp_path: Path, kind: pa.DataType
) -> None:
    raw: dict[pa.DataType, list[Any]] = {
        pa.bool_(): [True, False],
        pa.int64(): [1, 0],
        pa.float64(): [1.0, 0.0],
        pa.date32(): [DAY, datetime.date(2024, 3, 2)],
        pa.timestamp("ns"): [NOON, datetime.datetime(2024, 3, 2, 12)],
    }
    table = pa.table({"text": ["a", "b", "c", "d"], "label": pa.array(raw[kind] * 2, kind)})
    pq.write_table(table, tmp_path / "d.parquet")
    table.to_pandas().to_csv(tmp_path / "d.csv", index=False)
    task = task_named("text-classification")
    found = [task.read(tmp_path / name, DataSection(source="d"), {}).train for name in ("d.csv", "d.parquet")]
    assert found[0]["label"] == found[1]["label"] and len(set(found[0]["label"])) == 2
    assert task.keys(found[0]) == task.keys(found[1])


def test_items_are_one_in_every_format(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "time"), *((1, f"{n}.0", n) for n in range(5))])
    table = pa.table({"user": [1.0] * 5, "item": np.arange(5), "time": np.arange(5)})
    pq.write_table(table, tmp_path / "d.parquet")
    task = task_named("recommendation")
    found = [
        task.read(tmp_path / name, DataSection(source="d"), {}).train[:] for name in ("d.csv", "d.parquet")
    ]
    assert found[0] == found[1]


def test_classes_that_a_job_names_are_named_alike() -> None:
    data = DataSection(source="d", classes=("False", "True"))
    assert named({"true", "false"}, data, "classes", "label")["classes"] == ["false", "true"]


def roster(*told: DataInfo) -> ClientRoster:
    names = [f"site-{letter}" for letter in "abc"[: len(told)]]
    return ClientRoster(names, np.ones(len(told), dtype=np.int64), told)


def test_the_server_remarks_classes_that_look_alike_or_that_one_site_alone_has() -> None:
    found = roster({"classes": ["Sport", "news"]}, {"classes": ["sport", "news"]})
    assert found.remarks == [
        "classes 'Sport', 'sport' differ by case or space only",
        "classes that one site alone has: 'Sport' (site-a), 'sport' (site-b)",
    ]
    many = roster({"intents": list("abcdefg")}, {"intents": ["a"]}, {"intents": ["a"]})
    assert many.remarks == [
        "classes that one site alone has: 'b' (site-a), 'c' (site-a), 'd' (site-a), 'e' (site-a),"
        " 'f' (site-a) and 1 more"
    ]


def test_nothing_is_remarked_where_nothing_is_odd_or_told() -> None:
    assert roster({"classes": ["a", "b"]}, {"classes": ["a", "b"]}).remarks == []
    assert roster({"classes": ["a", "A"], "pinned": True}, {"classes": ["a"]}).remarks == []
    assert roster({}, {}).remarks == []
    # Simulated clients tell one list for all.
    assert ClientRoster(["a", "b"], np.ones(2, dtype=np.int64), [{"classes": ["x", "y"]}]).remarks == []
