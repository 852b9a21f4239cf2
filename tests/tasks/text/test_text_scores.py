"""Several labels at once, and numbers: what is read, what is told, what is measured, what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score

from atoll.data.dataset import Dataset
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.learning.compatibility import check_fits
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.text_scores.labels import TEXT_LABELS
from atoll.tasks.text_scores.metrics import BinnedMap, BinnedSpearman, MacroF1, Pearson, SubsetAccuracy
from atoll.tasks.text_scores.numbers import TEXT_REGRESSION
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

DATA = DataSection(source="x")


def read(task: Any, path: Path, *rows: dict[str, Any]) -> Dataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: Dataset = task.read(path, DATA, {}).train
    return found


def test_labels_are_lists_in_every_format(tmp_path: Path) -> None:
    rows = read(TEXT_LABELS, tmp_path / "a.jsonl", {"text": "t", "labels": ["b", "a", "b"]})
    (tmp_path / "b.csv").write_text('text,topics\nt,"[""a"", ""b""]"\nu,[]\n')
    table = TEXT_LABELS.read(tmp_path / "b.csv", DATA, {}).train
    assert rows["labels"] == [["a", "b"]] and table["labels"] == [["a", "b"], []]
    assert TEXT_LABELS.keys(rows) == TEXT_LABELS.keys(table)[:1]
    assert TEXT_LABELS.local_info(table, DATA, {}) == {"labels": ["a", "b"]}
    given = DataSection(source="x", classes=("a", "c"))
    assert TEXT_LABELS.fits(table, given, {}) == [1]
    info = {"labels": ["a", "c", "b"]}
    assert sorted(TEXT_LABELS.shard(table, info).table.tolist()) == [[0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        (TEXT_LABELS, {"text": "t", "labels": "a"}, "line 1: 'a', expected a list such as"),
        (TEXT_LABELS, {"text": "t", "labels": None}, "line 1: nothing, expected a list"),
        (TEXT_LABELS, {"text": "", "labels": []}, "line 1: empty, expected some text"),
        (TEXT_REGRESSION, {"text": "t", "number": "many"}, "line 1: 'many', expected a number"),
        (TEXT_REGRESSION, {"text": "t"}, "expected one for the number"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, task: Any, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem) as told:
        read(task, tmp_path / "a.jsonl", row)
    assert "\n" not in str(told.value)


def test_numbers_are_on_the_scale_of_all_clients_or_of_the_job(tmp_path: Path) -> None:
    parts = [
        read(TEXT_REGRESSION, tmp_path / f"{name}.jsonl", *({"text": "t", "score": n} for n in numbers))
        for name, numbers in (("a", (1, 2, 3.5)), ("b", (10,)))
    ]
    info = TEXT_REGRESSION.merge_info([TEXT_REGRESSION.local_info(part, DATA, {}) for part in parts])
    all_of_them = np.array([1, 2, 3.5, 10])
    assert info == pytest.approx({"mean": all_of_them.mean(), "deviation": all_of_them.std()})
    learnt = TEXT_REGRESSION.shard(parts[1], info).table
    assert float(learnt) == pytest.approx((10 - all_of_them.mean()) / all_of_them.std())
    given = {"mean": 2.0, "deviation": 4.0}
    assert TEXT_REGRESSION.local_info(parts[0], DATA, given) == {"given": True}
    assert TEXT_REGRESSION.merge_info([{"given": True}]) == {}
    for moments in ([2, 6.0, 18.0], [2, float("nan"), 1.0], [0, 0, 0]):
        with pytest.raises(ConfigError, match="needs finite numbers that differ"):
            TEXT_REGRESSION.merge_info([{"moments": moments}])


def test_what_needs_one_class_is_refused() -> None:
    job = job_of("text-regression", "head")
    for key, table in (
        ("tune.head_init", {"tune": {"head_init": "ridge"}}),
        ("task.options.deviation", {"task": {"name": "text-regression", "options": {"mean": 1.0}}}),
        ("data.columns.label", {"data": {"source": "x", "columns": {"label": "y"}}}),
    ):
        with pytest.raises(ConfigError, match=key):
            check_fits(Job.parse(json.loads(job.canonical) | table, origin="test"), TEXT_REGRESSION)


def test_scores_of_labels_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    true = draw.random((80, 4)) < (0.5, 0.2, 0.1, 0.0)
    chances = np.round(np.clip(draw.normal(0.3 + 0.3 * true, 0.25), 0, 0.99) * 200) / 200 + 0.0025
    said = chances > 0.5
    metrics = (SubsetAccuracy(), MacroF1(4), BinnedMap(4))
    for rows in (slice(0, 30), slice(30, 80)):
        for metric in metrics:
            metric.update(torch.tensor(chances[rows]), torch.tensor(true[rows]).long())
    real = (said | true).any(axis=0)
    precision = [average_precision_score(true[:, k], chances[:, k]) for k in range(3)]
    expected = [
        (said == true).all(axis=1).mean(),
        f1_score(true[:, real], said[:, real], average="macro"),
        np.mean(precision),
    ]
    assert [float(metric.compute()) for metric in metrics] == pytest.approx(expected)


def test_correlations_are_those_of_scipy() -> None:
    draw = np.random.default_rng(2)
    true = np.round(draw.normal(size=300), 1) + 0.05  # in the middles of what is told apart
    said = np.round(0.5 * true + draw.normal(size=300), 1) + 0.05
    metrics = (Pearson(), BinnedSpearman())
    for rows in (slice(0, 100), slice(100, 300)):
        for metric in metrics:
            metric.update(torch.tensor(said[rows]), torch.tensor(true[rows]))
    expected = [pearsonr(said, true).statistic, spearmanr(said, true).statistic]
    assert [float(metric.compute()) for metric in metrics] == pytest.approx(expected, abs=1e-9)


def test_what_nothing_is_there_to_measure_by_is_undefined() -> None:
    same, other = torch.full((3,), 0.3, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)
    for metric in (Pearson(), BinnedSpearman()):
        metric.update(same, other)
        assert torch.isnan(metric.compute())
    nothing = torch.zeros(2, 2)
    for labelled in (MacroF1(2), BinnedMap(2)):
        labelled.update(nothing, nothing.long())
        assert torch.isnan(labelled.compute())


@pytest.mark.parametrize("task", ["text-labels", "text-regression"])
def test_a_run_ends_with_the_metrics_and_says_what_it_learnt(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    result = simulate(job, tmp_path / "out", on_event=ignore_events, report=False)
    found = result.final["clients"]["client-0000"]
    assert ("map" in found and "subset_accuracy" in found) or ("pearson" in found and "spearman" in found)
    assert found["loss"] > 0
