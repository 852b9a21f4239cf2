"""`atoll distil`: a smaller student of a run, on public data with labels and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import atoll
from atoll.cli.main import run
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on texts, with its data and its small network beside it."""
    folder = tmp_path_factory.mktemp("distil")
    data = {"data": {"source": "written", "classes": ("good", "bad"), "test_fraction": 0.2}}
    simulate(
        ready(job_of("text-classification", "full", **data), folder),
        folder / "run",
        on_event=ignore_events,
        report=False,
    )
    return folder


def distilled(teacher: Path, data: str, name: str, *options: str) -> int:
    line = ["distil", str(teacher / "run"), "--student", str(teacher / "bert"), "--data", str(teacher / data)]
    few = ["--set", "federation.rounds=2", "--out", str(teacher / name)]
    return run([*line, *few, *options])


def test_a_student_of_labelled_data_is_a_run_like_any_other(teacher: Path) -> None:
    assert distilled(teacher, "data", "student") == 0
    made = atoll.Run(teacher / "student")
    assert made.job.train.teacher == str(teacher / "run") and made.job.federation.clients == 1
    assert made.result.facts["teacher"] and made.report.is_file()
    assert made.predict(["good good"])[0]["label"] in ("good", "bad")
    assert run(["export", str(teacher / "student"), "--format", "safetensors"]) == 0


def test_unlabelled_texts_get_the_teachers_labels_and_its_whole_weight(teacher: Path) -> None:
    texts = [f"{word} {number} {word}" for number in range(30) for word in ("good", "bad", "a b")]
    (teacher / "texts.txt").write_text("\n".join(texts))
    assert distilled(teacher, "texts.txt", "unlabelled", "--weight", "0.5") == 2
    assert distilled(teacher, "texts.txt", "unlabelled") == 0
    lines = [json.loads(line) for line in (teacher / "unlabelled-data" / "data.jsonl").open()]
    assert [line["text"] for line in lines] == texts
    said = atoll.Run(teacher / "run").predict(texts)
    assert [line["label"] for line in lines] == [answer["label"] for answer in said]
    assert atoll.Run(teacher / "unlabelled").job.train.distillation_weight == 1.0


def test_what_is_not_there_is_one_line(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distilled(teacher, "nowhere", "none") == 2
    assert "--data: no such file or folder" in capsys.readouterr().err
    assert not (teacher / "none").exists()
