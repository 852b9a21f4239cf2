"""Times as files hold them: one order for all of them, and one line where there is none."""

import csv
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.learning.compatibility import check_fits
from atoll.tasks import task_named
from atoll.tasks.moments import MomentReader, gaps, in_time

SHORT = {"history": 2, "horizon": 1, "season": 1}


def write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def history(path: Path, times: list[str], **data: Any) -> list[str]:
    """The items of a user with something at each of these times, in the order in which they are read."""
    write(path, "user,item,time", [("u", f"i{n}", time) for n, time in enumerate(times)])
    section = DataSection(source=str(path), test_fraction=0, **data)
    items: list[str] = task_named("recommendation").read(path, section, {}).train["items"][0]
    return items


def series(path: Path, dates: list[str], **data: Any) -> Any:
    write(path, "date,value", [(date, n) for n, date in enumerate(dates)])
    section = DataSection(source=str(path), test_fraction=0, **data)
    return task_named("forecasting").read(path, section, SHORT)


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["9", "10", "100", "11.5", "11"], [0, 1, 4, 3, 2]),
        (["1700000000000000001", "1700000000000000000", "2", "3"], [2, 3, 1, 0]),
        (["2024-01-10", "2024-01-09", "2024-01-11", "2023-12-31"], [3, 1, 0, 2]),
        # 12:00+02:00 is 10:00 in UTC, before 11:00Z.
        (["2024-01-09T11:00Z", "2024-01-09T12:00+02:00", "2024-01-09T13:00+01:00", "2024-01-10T00:30+14:00"],
         [1, 3, 0, 2]),
        (["2024-01-09 12:00:00.5", "2024-01-09 12:00", "2024-01-09 12:00:01", "2024-01-09"], [3, 1, 0, 2]),
    ],
)  # fmt: skip
def test_a_history_is_in_the_order_of_its_moments(tmp_path: Path, times: list[str], order: list[int]) -> None:
    assert history(tmp_path / "d.csv", times) == [f"i{n}" for n in order]


@pytest.mark.parametrize(
    ("times", "line", "said"),
    [
        (["1/9/2024", "1/10/2024", "2/1/2024", "3/1/2024"], 2, "'1/9/2024', expected a time: a number"),
        (["day 9", "day 10", "day 11", "day 8"], 2, "'day 9', expected a time"),
        (["2024-01-09", "2024-01-10T10:00Z", "2024-01-11", "2024-01-12"], 3,
         "'2024-01-10T10:00Z' is a time with an offset, expected a time without an offset as in"),
        (["5", "6", "2024-01-11", "7"], 4, "'2024-01-11' is a time without an offset, expected a number"),
        (["5", "6", "", "7"], 4, "'', expected a time"),
        (["2024-02-30", "2024-01-02", "2024-01-03", "2024-01-04"], 2, "'2024-02-30', expected a time"),
    ],
)  # fmt: skip
def test_what_has_no_order_is_one_line_with_its_place(
    tmp_path: Path, times: list[str], line: int, said: str
) -> None:
    for read in (history, series):
        with pytest.raises(DataError) as refused:
            read(tmp_path / "d.csv", times)
        assert f"d.csv line {line}: {said}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_format_says_how_other_times_are_written(tmp_path: Path) -> None:
    times = ["1/9/2024", "1/10/2024", "12/31/2023", "2/1/2024"]
    assert history(tmp_path / "d.csv", times, time_format="%m/%d/%Y") == ["i2", "i0", "i1", "i3"]
    assert history(tmp_path / "e.csv", [*times[:2], "9/1/2023", "2/1/2024"], time_format="%d/%m/%Y") == [
        "i2", "i3", "i0", "i1",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"line 4: '12/31/2023', expected a time as data.time_format = '%d"):
        history(tmp_path / "d.csv", times, time_format="%d/%m/%Y")


@pytest.mark.parametrize(
    ("given", "said"), [("%Q", "bad directive"), ("day", "expected a format of strptime")]
)
def test_a_format_that_is_none_is_refused_with_its_key(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.time_format") as refused:
        job("recommendation", time_format=given)
    assert said in str(refused.value)


def test_a_format_without_times_is_refused() -> None:
    task = task_named("text-classification")
    with pytest.raises(ConfigError, match=r"data\.time_format: text-classification reads no times"):
        check_fits(job("text-classification", time_format="%Y"), task)


def job(task: str, **data: Any) -> Job:
    table = {
        "name": "t",
        "seed": 1,
        "task": {"name": task},
        "data": {"source": "./d.csv", **data},
        "backbone": {"name": "hf:x"},
    }
    return Job.parse(table, origin="test")


def pandas_time(moment: datetime.datetime, zone: str | None = None) -> Any:
    """A moment in UTC as a pandas timestamp in a zone, which Arrow makes of nanoseconds."""
    return pa.scalar(moment, pa.timestamp("ns", zone)).as_py()


NOT_A_TIME = pa.array([None], pa.timestamp("ns")).to_pandas()[0]
"""pandas' NaT."""


def test_a_moment_is_one_text_in_every_format() -> None:
    noon = datetime.datetime(2024, 3, 1, 12)
    zone = datetime.timezone(datetime.timedelta(hours=2))
    read = {
        MomentReader()(cell, "")
        for cell in (noon, "2024-03-01T12:00", "2024-03-01 12:00:00", pandas_time(noon))
    }
    assert read == {"2024-03-01T12:00:00"}
    day = (
        datetime.date(2024, 3, 1),
        "2024-03-01",
        "2024-03-01 00:00:00",
        pandas_time(datetime.datetime(2024, 3, 1)),
    )
    assert {MomentReader()(cell, "") for cell in day} == {"2024-03-01"}
    far = (
        noon.replace(tzinfo=zone),
        "2024-03-01T10:00Z",
        pandas_time(noon - datetime.timedelta(hours=2), "+02:00"),
    )
    assert {MomentReader()(cell, "") for cell in far} == {"2024-03-01T10:00:00"}
    assert {MomentReader()(cell, "") for cell in (7, 7.0, "7", "7.0")} == {"7"}


@pytest.mark.parametrize(
    "cell", [None, True, float("nan"), float("inf"), NOT_A_TIME, "", "soon", [1], "noon"]
)
def test_what_is_no_moment_is_refused(cell: object) -> None:
    with pytest.raises(DataError, match="expected a time"):
        MomentReader()(cell, "d.csv line 2")


def test_parquet_timestamps_are_read_as_csv_times_are(tmp_path: Path) -> None:
    days = [datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3, 4)]
    values = pa.array([0.0, 1.0, 2.0, 3.0])
    for unit in ("s", "us", "ns"):
        table = pa.table({"date": pa.array(days, pa.timestamp(unit, "Europe/Berlin")), "value": values})
        pq.write_table(table, tmp_path / "d.parquet")
        section = DataSection(source="d", test_fraction=0)
        found = task_named("forecasting").read(tmp_path / "d.parquet", section, SHORT)
        again = series(tmp_path / "d.csv", [day.isoformat() for day in days])
        assert found.train[:] == again.train[:]


def test_the_end_of_summer_time_is_no_step_twice(tmp_path: Path) -> None:
    hours = [
        "2024-10-27T01:00+02:00",
        "2024-10-27T02:00+02:00",
        "2024-10-27T02:00+01:00",
        "2024-10-27T03:00+01:00",
    ]
    assert series(tmp_path / "d.csv", hours).train["history"] == [[0.0, 1.0], [1.0, 2.0]]
    with pytest.raises(DataError, match="has 2024-10-27T02:00:00 twice"):
        series(tmp_path / "e.csv", [hour[:16] for hour in hours])


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        (np.arange("2024-01-01", "2024-02-01", dtype="datetime64[D]").astype(str).tolist(), []),
        # Weekends are no gaps of a series that has none; a missing Wednesday is.
        (["2024-01-04", "2024-01-05", "2024-01-08", "2024-01-09", "2024-01-11", "2024-01-12"],
         ["2 days from 2024-01-09 to 2024-01-11, where a step is 1 day"]),
        (["2024-01-01", "2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01"], []),
        (["2024-01-01T00:00:00", "2024-01-01T01:00:00", "2024-01-01T02:00:00", "2024-01-01T04:30:00"],
         ["150 minutes from 2024-01-01T02:00:00 to 2024-01-01T04:30:00, where a step is 1 hour"]),
        (["1", "2", "3", "9", "10", "12"],
         ["6 from 3 to 9, where a step is 1", "2 from 10 to 12, where a step is 1"]),
        (["2024-01-01"], []),
    ],
)  # fmt: skip
def test_gaps_are_where_a_step_is_missing(moments: list[str], expected: list[str]) -> None:
    assert moments == sorted(moments, key=in_time)
    assert [str(gap) for gap in gaps(moments)] == expected


def test_check_remarks_a_gap_in_a_series(tmp_path: Path) -> None:
    before = np.arange("2024-01-01", "2024-02-10", dtype="datetime64[D]").astype(str).tolist()
    after = np.arange("2024-04-11", "2024-05-10", dtype="datetime64[D]").astype(str).tolist()
    path = write(tmp_path / "d.csv", "date,value", [(date, n) for n, date in enumerate(before + after)])
    said = CliRunner().invoke(app, ["check", str(path), "--task", "forecasting"])
    assert said.exit_code == 0
    remark = "series 'series': 62 days from 2024-02-09 to 2024-04-11, where a step is 1 day"
    assert f"steps are missing, and rows on both sides count as neighbours: {remark}" in said.output


def test_check_takes_the_format_of_times(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "user,item,time", [("u", n, f"{n}.1.2024") for n in range(1, 8)])
    line = ["check", str(path), "--task", "recommendation"]
    assert CliRunner().invoke(app, line).exit_code != 0
    assert CliRunner().invoke(app, [*line, "--time-format", "%d.%m.%Y"]).exit_code == 0
    refused = CliRunner().invoke(app, [*line, "--time-format", "day"])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith("data.time_format: expected a format of strptime")


def test_check_counts_each_unreadable_time_once(tmp_path: Path) -> None:
    rows = [(f"2024-01-0{n}" + ("T12:00Z" if n % 2 else ""), n) for n in range(1, 7)]
    path = write(tmp_path / "d.csv", "date,value", rows)
    found = task_named("forecasting").inspect(path, DataSection(source=str(path)), SHORT)
    assert found.bad == len(found.problems) == 3
