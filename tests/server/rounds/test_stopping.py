"""Early stopping: the best model by what clients keep back, at any kill, and never by private results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.rounds.early_stopping import EarlyStopping
from atoll.sim.engines.engine import simulate
from tests.sim.test_simulation import job

PATIENT: dict[str, Any] = {
    "data": {"validation_fraction": 0.3, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "train": {"lr": 1.0},
    "federation": {"rounds": 30},
}


def patient(**evaluate: Any) -> Job:
    return job(**PATIENT, evaluate=evaluate)


def run(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, report=False, **options)


@pytest.mark.parametrize(
    ("metric", "values", "best", "over"),
    [
        ("accuracy", [0.1, 0.3, 0.3, 0.2], 2, True),
        ("accuracy", [0.1, 0.3, 0.2, 0.4], 4, False),
        ("wer", [0.9, 0.5, None, 0.6], 2, False),
        ("auroc", [0.9, None, None, 0.8, 0.7], 1, True),
        ("accuracy", [None, None, 0.5], 3, False),
    ],
)
def test_the_best_is_kept_and_patience_counts_what_was_not_better(
    metric: str, values: list[float | None], best: int, over: bool
) -> None:
    stopping = EarlyStopping(metric, 2)
    for round, value in enumerate(values, start=1):
        stopping.update(round, value, {"w": torch.tensor(float(round))})
    assert (stopping.round, float(stopping.best["w"]), stopping.is_over) == (best, float(best), over)
    again = EarlyStopping(metric, 2)
    assert again.resume({"momentum.w": 1.0, **stopping.state()}) == {"momentum.w": 1.0}
    assert again == stopping


def test_a_metric_that_was_never_defined_leaves_the_last_model() -> None:
    stopping = EarlyStopping("auroc", 1)
    for round in (1, 2, 3):
        stopping.update(round, None, {"w": torch.zeros(1)})
    assert not stopping.is_over and not stopping.best
    assert "at no time was the clients' auroc defined" in stopping.description


def test_a_run_stops_and_keeps_its_best_model_by_the_clients_validation_splits(tmp_path: Path) -> None:
    result = run(patient(patience=3), tmp_path / "run")
    lines = result.rounds
    found = [line["validation"]["accuracy"] for line in lines]
    best = max(range(len(found)), key=found.__getitem__)
    assert len(lines) == best + 4 < 30
    assert result.model_sha256 == lines[best]["model_sha256"]
    assert f"the model is round {best + 1}'s" in " ".join(result.notes)
    # What the clients measure of the final model, all together, is what it was chosen by.
    clients = [c for c in result.final["clients"].values() if c["examples"]]
    right = sum(c["accuracy"] * c["examples"] for c in clients)
    assert right / sum(c["examples"] for c in clients) == pytest.approx(found[best], abs=1e-6)


def test_engines_and_a_resumed_run_stop_in_the_same_round_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(patient(patience=2), tmp_path / "whole")
    looped = run(patient(patience=2), tmp_path / "loop", engine="loop")

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == len(whole.rounds) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(patient(patience=2), tmp_path / "cut", on_event=stop, report=False)
    resumed = run(patient(patience=2), tmp_path / "cut", resume=True)
    for other in (looped, resumed):
        assert other.model_sha256 == whole.model_sha256
        assert len(other.rounds) == len(whole.rounds)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            {
                "evaluate": {"patience": 2},
                "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            },
            r"evaluate\.patience: which round is best would be chosen by data that is promised privacy",
        ),
        (
            {"evaluate": {"patience": 2}, "data": {"validation_fraction": 0.0}},
            r"evaluate\.patience: clients keep nothing back",
        ),
    ],
    ids=["privacy", "nothing-kept-back"],
)
def test_it_never_looks_at_what_it_must_not(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job(**tables)
