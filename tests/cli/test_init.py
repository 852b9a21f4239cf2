"""`atoll init`: the first job for somebody's data, which must be one that runs."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest

from atoll.cli.init import BEGINNINGS, in_toml
from atoll.cli.main import run
from atoll.job.job import Job
from atoll.sim.population.write_shards import write_shards
from atoll.tasks import BUILT_INS
from tests.support.task_data import ready
from tests.support.task_jobs import job_of


def reviews(folder: Path, **columns: list[Any]) -> Path:
    rows: dict[str, list[Any]] = {
        "text": [f"thing {row} was {'good' if row % 2 else 'bad'}" for row in range(60)],
        "label": ["good" if row % 2 else "bad" for row in range(60)],
    }
    path = folder / "Shop reviews, 2024.csv"
    pyarrow.csv.write_csv(pa.table(rows | columns), path)
    return path


def test_there_is_a_beginning_for_every_task() -> None:
    assert set(BEGINNINGS) == set(BUILT_INS)


@pytest.mark.parametrize("task", sorted(BEGINNINGS))
def test_a_first_job_of_each_task_is_one_that_can_run(task: str, tmp_path: Path) -> None:
    method = "full" if BEGINNINGS[task].method == "full" else "head"
    job = ready(job_of(task, method), tmp_path)
    data = Path(job.data.source)
    if not data.is_absolute():
        write_shards(job, tmp_path / "shards")
        data = tmp_path / "shards" / "client-0000"
    options = [
        word for key, value in job.task.options.items() for word in ("--option", f"{key}={in_toml(value)}")
    ]
    out = tmp_path / "mine.toml"
    assert run(["init", task, str(data), "--out", str(out), *options]) == 0
    written = Job.load(out)
    assert (written.task.name, written.data.source) == (task, str(data.resolve()))
    assert written.task.options == job.task.options
    assert out.read_text().count("#") > 10


def test_its_choices_follow_from_the_data_and_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = reviews(
        tmp_path, hospital=[f"h{row % 3}" for row in range(60)], nurse=[row % 2 for row in range(60)]
    )
    assert run(["init", "text-classification", data.name]) == 0
    out = Path("shop-reviews-2024.toml")
    assert f"atoll simulate {out}" in capsys.readouterr().out
    job, text = Job.load(out), out.read_text()
    assert job.data.classes == ("bad", "good") and job.federation.clients == 3
    assert job.data.partition.by == "hospital"  # type: ignore[union-attr]
    assert '# partition = { kind = "natural", by = "nurse" }      # and clients = 2' in text
    assert 'source = "./Shop reviews, 2024.csv"' in text  # both can move together
    bert = ready(job_of("text-classification", "head"), tmp_path).backbone.name
    assert run(["simulate", str(out), "--set", f"backbone.name={bert}", "--set", "federation.rounds=1"]) == 0


def test_without_such_a_column_rows_are_dealt_by_class(tmp_path: Path) -> None:
    data, out = reviews(tmp_path, id=list(range(60)), city=["a"] * 55 + ["b"] * 5), tmp_path / "a.toml"
    assert run(["init", "text-classification", str(data), "--out", str(out)]) == 0
    job = Job.load(out)
    assert (job.data.partition.kind, job.federation.clients) == ("dirichlet", 3)
    assert (
        run(["init", "text-classification", str(data), "--out", str(out), "--clients", "5"]) == 2
    )  # is there
    other = tmp_path / "b.toml"
    assert run(["init", "text-classification", str(data), "--out", str(other), "--clients", "5"]) == 0
    assert Job.load(other).federation.clients == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["text-clasification", "{data}"], "text-classification"),
        (["text-classification", "{data}", "--label", "stars"], "stars"),
        (["text-classification", "nowhere"], "nowhere"),
        (["text-classification", "{data}", "--out", "no/such/a.toml"], "no folder"),
        (["image-classification", "{data}"], "image"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = reviews(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(["init", *(word.format(data=data) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(Path().iterdir()) == []


def test_data_that_cannot_be_used_gets_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = reviews(tmp_path)
    data.write_text(data.read_text() + '"",good\n')
    assert run(["init", "text-classification", str(data), "--out", str(tmp_path / "a.toml")]) == 2
    assert not (tmp_path / "a.toml").exists() and "Shop reviews" in capsys.readouterr().err


@pytest.mark.parametrize("value", ['a"b\\c\n', [1, 2.5, "x"], {"a": ["b"], "c": True}, 0.003])
def test_values_are_written_as_toml_reads_them(value: Any) -> None:
    assert tomllib.loads(f"x = {in_toml(value)}")["x"] == value


def test_the_commands_that_it_proposes_can_be_typed_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = reviews(tmp_path)
    assert run(["init", "text-classification", str(data), "--out", "my job.toml"]) == 0
    assert "run it  atoll simulate 'my job.toml'\n" in capsys.readouterr().out
    data.write_text("text,label\n,a\n,b\nx,a\n")
    assert run(["init", "text-classification", str(data), "--out", "other.toml"]) == 2
    proposed = capsys.readouterr().err.strip().partition("see: ")[2]
    assert shlex.split(proposed) == ["atoll", "check", str(data), "--task", "text-classification"]
