"""What leaves a federation under a promise depends on the data through the noised sums alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atoll.client.dp.dp_sgd_model
import atoll.client.site
import atoll.server.run.privacy_report
from atoll.client.dp.dp_sgd import DpSgd
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import CHARGED_ROUNDS
from atoll.server.rounds.secure_aggregation import SecureRound
from tests.job.job_grid import COSTLY, FILE, FIRST, LEFT_OUT, factors, job_in, keys, typical
from tests.privacy.detectors import Detected
from tests.privacy.runs.leaks import Leaving, check_leaving, run_of
from tests.privacy.runs.record_neighbours import TaskData, neighbours_of
from tests.privacy.runs.test_neighbours import PLANTS
from tests.support.task_jobs import TABLES
from tests.tasks.test_data_info import rows_that_do_not_fit_are_refused, sizes_are_told

Row = dict[str, Any]
ROWS: list[Row] = json.loads(FILE.read_text())
REFUSED = {
    "data.folds", "data.fold", "evaluate.patience", "evaluate.adapt", "train.teacher_temperature",
    "train.teacher_weight",
}  # fmt: skip
"""Keys that no job under a promise accepts, or none that doesn't name a teacher."""


@pytest.fixture(scope="module", params=sorted(TABLES))
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    torch.set_num_threads(1)
    return TaskData(request.param, tmp_path_factory.mktemp("leaks"))


MOVED = 0.001
"""Less of the clipping norm than this is nothing: the neighbour was kept back, not drawn, or unfit."""


def options_of(row: Row) -> set[Any]:
    """A row's values, and pairs of its keys, of which those in `FIRST` count with their values."""
    values = [(key, json.dumps(value)) for key, value in row.items()]
    named = sorted(key if key not in FIRST else f"{key} = {row[key]}" for key in row)
    return {*values, *combinations(named, 2)}


def sample(rows: Sequence[Row]) -> list[int]:
    """Rows that have together what all have, greedily; a costly task's row where it brings most by far."""
    options = [options_of(row) for row in rows]
    left, chosen = set[Any]().union(*options), list[int]()
    while left:
        gains = [
            len(own & left) / (8 if row["task"] in COSTLY else 1)
            for own, row in zip(options, rows, strict=True)
        ]
        chosen.append(gains.index(max(gains)))
        left -= options[chosen[-1]]
    for number in sorted(chosen, key=lambda number: rows[number]["task"] not in COSTLY):
        others = [options[other] for other in chosen if other != number]
        if options[number] <= set[Any]().union(*others):
            chosen.remove(number)
    return chosen


SAMPLE = frozenset(sample(ROWS))
"""The rows that `make test` plays: each key with each other, and with each task, tuning and promise that goes
with it, and each value. The matrix plays all, which have every pair of values."""


def jobs_of(data: TaskData, numbers: Collection[int] = range(len(ROWS))) -> Iterator[tuple[int, Job]]:
    for number, row in enumerate(ROWS):
        if row["task"] == data.task and number in numbers:
            job = job_in(row, data)
            assert job is not None, (
                f"row {number} is not accepted any more; expected python -m tests.job.job_grid"
            )
            yield number, job


class Runs:
    """A job's runs: one on the data as it is, and others with a neighbour of it."""

    def __init__(self, data: TaskData, job: Job) -> None:
        self.data, self.job = data, job
        self.warm: dict[str, Learner] = {}
        self.first = self.of(data.clients[0])

    def of(self, folder: Path) -> Leaving:
        folders = [folder, *self.data.clients[1:]]
        return run_of(self.job, folders, self.data.folder / "run", self.warm)

    def check(self, folder: Path) -> float:
        return check_leaving(self.job, self.first, self.of(folder))


@pytest.mark.slow
def test_each_row_tells_neighbours_apart_by_its_sums_alone(data: TaskData) -> None:
    """With one neighbour a row, another each time; with the next one too where the first moved nothing."""
    moved, failed = [], []
    for number, job in jobs_of(data, SAMPLE):
        choice = list(neighbours_of(data, job))
        runs, part = Runs(data, job), 0.0
        for place in (number, number + 1):
            if part <= MOVED:
                part = check(runs, number, *choice[place % len(choice)])
        moved.append(part)
        failed += [(number, told) for told in runs.first.sent if str(told).startswith("the run failed")]
        promised = runs.first.files["result.json"]["privacy"]
        assert promised["unit"] == job.privacy.unit and promised["epsilon"] > 0
    assert failed == []
    assert sum(part > MOVED for part in moved) > len(moved) / 2, "next to nothing was measured"


def check(runs: Runs, number: int, name: str, folder: Path) -> float:
    try:
        return runs.check(folder)
    except AssertionError as error:
        raise AssertionError(f"row {number} ({ROWS[number]}), {name}: {error}") from error


@pytest.mark.matrix
def test_each_row_tells_no_neighbours_apart(data: TaskData) -> None:
    for number, job in jobs_of(data):
        runs = Runs(data, job)
        for name, folder in neighbours_of(data, job):
            check(runs, number, name, folder)


def test_the_sample_has_every_pair_of_options() -> None:
    """Counted again, key by key."""
    chosen = [ROWS[number] for number in SAMPLE]
    for one, other in combinations(factors(), 2):
        pairs = [
            {
                tuple(row[key] if key in FIRST else key for key in (one, other))
                for row in rows
                if one in row and other in row
            }
            for rows in (chosen, ROWS)
        ]
        assert pairs[0] == pairs[1], (one, other)
    for key in factors():
        assert {json.dumps(row.get(key)) for row in chosen} >= {
            json.dumps(row[key]) for row in ROWS if key in row
        }
    assert len(SAMPLE) < 2 / 3 * len(ROWS)


def test_each_key_of_a_job_is_in_the_grid_or_left_out_for_a_reason() -> None:
    known = dict(keys())
    assert set(known) == {key for key in known if key in LEFT_OUT or key in factors()}
    assert set(LEFT_OUT) | REFUSED <= set(known) and not set(LEFT_OUT) & set(factors())
    for key, values in factors().items():
        used = {json.dumps(row[key]) for row in ROWS if key in row}
        wanted = {json.dumps(value) for value in values if value is not None}
        assert used == (set() if key in REFUSED else wanted), key


@pytest.mark.slow
def test_the_rows_have_every_value_with_every_task_that_accepts_it(data: TaskData) -> None:
    """Found again from the schema, without what chose the rows."""
    rows = [row for row in ROWS if row["task"] == data.task]
    for key, values in factors().items():
        for value in values[1:] if key not in FIRST else ():
            used = any(row.get(key) == (list(value) if isinstance(value, tuple) else value) for row in rows)
            alone = [
                {"task": data.task, "tune.method": method, "promise": promise, key: value}
                for method in factors()["tune.method"]
                for promise in factors()["promise"]
            ]
            assert used or not any(job_in(row, data) is not None for row in alone), (key, value)


def test_a_key_of_a_new_type_must_be_given() -> None:
    assert typical(Job.model_fields["name"]) == ()


# What used to be done, put back


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        atoll.client.dp.dp_sgd_model,
        "_clipped",
        lambda each, private, scale: private.divisor * torch.ones(len(next(iter(each.values())))),
    )


def losses_are_told(patch: pytest.MonkeyPatch) -> None:
    told = DpSgd.public_fields

    def with_sizes(private: DpSgd, clients: Any) -> Any:
        weights, states = told(private, clients)
        return weights, states | {"train_loss.sum": torch.rand(len(clients), dtype=torch.float64)}

    patch.setattr(DpSgd, "public_fields", with_sizes)


def patched(*planted: tuple[Any, str, Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for place, name, value in planted:
            patch.setattr(place, name, value)

    return plant


def charges_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """As it was: a secure sum of updates with noise of their own said nothing of ledgers."""
    told = SecureRound._as_update

    def without(self: SecureRound, total: Any) -> Any:
        update = told(self, total)
        return replace(update, states={n: t for n, t in update.states.items() if n != CHARGED_ROUNDS})

    patch.setattr(SecureRound, "_as_update", without)
    patch.setattr(atoll.server.run.privacy_report, "_most_asked", lambda run: 0)


def a_step_more_than_charged(patch: pytest.MonkeyPatch) -> None:
    made = atoll.client.site.private_training

    def longer(*given: Any) -> DpSgd:
        private = made(*given)
        draw = private.draw
        assert draw is not None
        return replace(private, draw=lambda client, numbers: [*draw(client, numbers), np.arange(1)])

    patch.setattr(atoll.client.site, "private_training", longer)


MIXED = (atoll.client.dp.dp_sgd_model, "refuse_mixed_examples", lambda *given, **more: None)
EXAMPLE = {"promise": "example, client", "tune.method": "full"}
VARIED = {"task": "image-classification", "train.augment": ["crop"]}
PUT_BACK: dict[str, tuple[Row, Any]] = {
    "dropout by place": (
        EXAMPLE | {"task": "text-classification", "train.dropout": 0.5},
        patched(PLANTS["dropout of texts"], MIXED),
    ),
    "augmentation by place": (EXAMPLE | VARIED, patched(PLANTS["augmentation"], MIXED)),
    "a split by count": (
        EXAMPLE | {"task": "image-classification", "data.validation_fraction": 0.5},
        patched(PLANTS["a split of pictures"]),
    ),
    "how many examples there are": (EXAMPLE | {"task": "text-classification"}, sizes_are_told),
    "names of the data's own": (
        {"task": "intent", "tune.method": "head", "promise": "client, distributed"},
        rows_that_do_not_fit_are_refused,
    ),
    "gradients as they are": (EXAMPLE | {"task": "text-classification"}, no_clipping),
    "what a secure sum cost": (
        EXAMPLE | {"task": "text-classification", "federation.secure_aggregation": True},
        charges_are_not_told,
    ),
    "a step more than charged": (EXAMPLE | {"task": "text-classification"}, a_step_more_than_charged),
    "losses": (EXAMPLE | {"task": "text-classification"}, losses_are_told),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUT_BACK)
def test_what_used_to_be_done_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, plant = PUT_BACK[name]
    torch.set_num_threads(1)
    data = TaskData(row["task"], tmp_path / "data")
    job = job_in(row, data)
    assert job is not None
    plant(monkeypatch)
    runs = Runs(data, job)
    with pytest.raises(Detected):
        for _, folder in neighbours_of(data, job):
            runs.check(folder)
