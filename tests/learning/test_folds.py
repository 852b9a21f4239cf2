"""Cross-validation inside clients: every example is kept back once, the same in all engines and in sweeps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import DataSection, Job
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner
from atoll.learning.split import split_shard
from atoll.protocol.validation_split import fold_of
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from tests.support.small import grey_png_shard, image_job

TABLE: dict[str, Any] = {
    "name": "folded",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits"},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"batch_size": 32, "lr": 1.0},
    "federation": {"clients": 4, "rounds": 3},
}


def job_of(**data: Any) -> Job:
    return Job.parse(TABLE | {"data": TABLE["data"] | data}, origin="test")


@pytest.mark.parametrize(("examples", "folds"), [(17, 5), (2, 2), (3, 5), (1, 3), (100, 10)])
def test_every_example_is_in_one_fold_and_none_takes_all(examples: int, folds: int) -> None:
    parts = [fold_of(examples, DataSection(source="x", folds=folds, fold=f)) for f in range(folds)]
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == (list(range(examples)) if examples > 1 else [])
    assert all(part.stop - part.start < examples for part in parts)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_site_splits_by_content_and_what_is_kept_back_is_not_trained_on() -> None:
    shard, seen = grey_png_shard(23, classes=3), []
    for fold in range(4):
        job = image_job("squeezenet1_1", data={"source": "digits", "folds": 4, "fold": fold})
        learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
        train, kept = split_shard(learner.job, learner.task, shard)
        assert sorted([*train.keys, *kept.keys]) == sorted(shard.keys)
        assert not {*train.keys} & {*kept.keys}
        seen += list(kept.keys)
    assert sorted(seen) == sorted(shard.keys)


def test_engines_agree_on_every_fold_and_folds_differ(tmp_path: Path) -> None:
    found = {
        (fold, engine): simulate(
            job_of(folds=3, fold=fold), tmp_path / f"{engine}-{fold}", engine=engine, on_event=ignore_events,
            report=False,
        )
        for fold in range(3)
        for engine in ("inline", "loop")
    }  # fmt: skip
    bits = [found[fold, "inline"].model_sha256 for fold in range(3)]
    assert bits == [found[fold, "loop"].model_sha256 for fold in range(3)]
    assert len(set(bits)) == 3
    kept = [sum(c["examples"] for c in found[f, "inline"].final["clients"].values()) for f in range(3)]
    assert sum(kept) == 1797 - 359  # a fifth is the test set: round(1797 * 0.2) = 359


@pytest.mark.slow
@pytest.mark.processes
def test_a_sweep_over_folds_judges_by_what_clients_keep_back(tmp_path: Path) -> None:
    path, out = tmp_path / "folded.toml", tmp_path / "swept"
    path.write_text(tomli_w.dumps(TABLE))
    given = ["sweep", str(path), "--folds", "3", "--vary", "train.lr=0.01,1.0", "--out", str(out)]
    assert command_line([*given, "--workers", "2"]) == 0
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["train.lr"], line["seed"], line["fold"]) for line in lines] == [
        (lr, "3", str(fold)) for fold in range(3) for lr in ("0.01", "1")
    ]
    for line in lines:
        result = json.loads((out / line["path"] / "result.json").read_text())
        clients = [c for c in result["final"]["clients"].values() if c["examples"]]
        mean = sum(c["accuracy"] * c["examples"] for c in clients) / sum(c["examples"] for c in clients)
        assert float(line["accuracy"]) == pytest.approx(mean)
    page = (out / "sweep.md").read_text()
    assert "| 3 |" in page and "folds and seeds" in page
    only = tmp_path / "only"
    assert command_line(["sweep", str(path), "--folds", "2", "--out", str(only), "--workers", "2"]) == 0
    assert "over 2 folds and seeds" in (only / "sweep.md").read_text()
    assert not (only / "frontier.png").exists()


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"data": {"source": "digits", "fold": 1}}, r"fold has no meaning without folds"),
        (
            {"data": {"source": "digits", "folds": 3, "fold": 3}},
            r"fold: expected 0 to 2 with folds = 3, found 3",
        ),
        (
            {
                "data": {"source": "digits", "folds": 3},
                "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            },
            r"data\.folds: clients measure nothing under a promise",
        ),
    ],
    ids=["alone", "too-many", "privacy"],
)
def test_folds_that_mean_nothing_are_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Job.parse(TABLE | tables, origin="test")


def test_a_task_that_splits_itself_has_no_folds() -> None:
    job = Job.parse(
        TABLE | {"task": {"name": "forecasting"}, "data": {"source": "x", "folds": 2}}, origin="test"
    )
    with pytest.raises(ConfigError, match=r"data\.folds: forecasting says itself what is measured on"):
        check_fits(job, task_named("forecasting"))
