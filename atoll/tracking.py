"""Runs beside other runs: their rounds and results in TensorBoard, MLflow or Weights & Biases.

They are written as they go or afterwards. What is written is what `metrics.jsonl` and `result.json` hold, no
more: under a promise of privacy they have only what may be told.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atoll.errors import ConfigError
from atoll.system.installed import is_installed

if TYPE_CHECKING:
    from atoll.job.job import Job
    from atoll.report.run_result import RunResult

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The package that each needs."""

TAG = "atoll.run"
"""An MLflow run's tag that says which run directory it is of."""

LOST = (OSError, ValueError)
"""What a tracker may fail with, a full disk or a silent server; MLflow's and W&B's own errors are added."""


class Tracker(Protocol):
    """Where a run's numbers go."""

    place: str

    def numbers(self, values: Mapping[str, float], round: int) -> None:
        """What is known after a round."""
        ...

    def log_text(self, values: Mapping[str, str]) -> None:
        """The job's settings, or what came out that is no number."""
        ...

    def close(self) -> None:
        """Nothing is to come."""
        ...


class TensorBoardTracker:
    """Event files in RUN/tensorboard."""

    def __init__(self, job: Job, run: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place = str(run / "tensorboard")
        self._writer = SummaryWriter(self.place, purge_step=after + 1 if after else None)

    def numbers(self, values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def log_text(self, values: Mapping[str, str]) -> None:
        table = "\n".join(["| key | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in values.items())])
        self._writer.add_text(next(iter(values)).partition(".")[0], table)

    def close(self) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of the experiment that is called as the job.

    It is kept at MLFLOW_TRACKING_URI, or in mlflow.db beside RUN.
    """

    def __init__(self, job: Job, run: Path, after: int) -> None:
        from mlflow.tracking import MlflowClient

        self.place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent}/mlflow.db"
        self._client = MlflowClient(tracking_uri=self.place)
        experiment_found = self._client.get_experiment_by_name(job.name)
        experiment = (
            self._client.create_experiment(job.name)
            if experiment_found is None
            else experiment_found.experiment_id
        )
        known = self._known(experiment, run, job) if after else None
        tags = {TAG: str(run.resolve()), "atoll.job_hash": job.hash}
        self._run = known or str(
            self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        )

    def _known(self, experiment: str, run: Path, job: Job) -> str | None:
        """The run that this one goes on with, if it was tracked from its beginning."""
        wanted = f"tags.`{TAG}` = '{run.resolve()}' and tags.`atoll.job_hash` = '{job.hash}'"
        runs = self._client.search_runs([experiment], wanted, max_results=1)
        return runs[0].info.run_id if runs else None

    def numbers(self, values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=round)

    def log_text(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._client.set_tag(self._run, name, value)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandbTracker:
    """A run of the W&B project that is called as the job.

    It goes to the server that `wandb login` or WANDB_BASE_URL names; with WANDB_MODE=offline it is kept in
    RUN/wandb, for `wandb sync`. Nothing about the machine, its code or its processes is sent.
    """

    def __init__(self, job: Job, run: Path, after: int) -> None:
        import wandb

        identity = hashlib.sha256(f"{run.resolve()} {job.hash}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=job.name,
            name=run.name,
            id=identity,
            dir=str(run),
            resume="allow" if after else None,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, host="", program="",
                x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            ),
        )  # fmt: skip
        self.place = self._run.url or str(Path(self._run.dir).parent)

    def numbers(self, values: Mapping[str, float], round: int) -> None:
        self._run.log(dict(values), step=round)

    def log_text(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Job, Path, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}


def check_trackers(names: Sequence[str], option: str = "--track") -> None:
    """Raises ConfigError where there is no such tracker, or its package isn't installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"{option}: expected one of {', '.join(TRACKERS)}, found {name!r}")
        if not is_installed(PACKAGES[name]):
            raise ConfigError(
                f"{option} {name}: the package {PACKAGES[name]} is not installed; pip install 'atoll[track]'"
            )


@dataclass
class Tracking:
    """Writes a run's lines to trackers; one that fails is told of once, and the run goes on without it."""

    job: Job
    run: Path
    names: Sequence[str]
    places: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Tracker] = field(default_factory=dict)

    def line(self, line: Mapping[str, Any]) -> None:
        """A round's line, as `metrics.jsonl` has it; the first one opens the trackers."""
        if not self.places:
            self._begin(after=int(line["round"]) - 1)
        values = dict(numbers_of({k: v for k, v in line.items() if k != "round"}))
        self._each(lambda tracker: tracker.numbers(values, int(line["round"])))

    def end(self, result: RunResult) -> None:
        """What `result.json` has beyond its rounds."""
        table = result.to_json()
        figures = {key: table[key] for key in ("baselines", "privacy", "seconds", "peak_rss_mb")}
        figures = {"final": {"server": result.final["server"]}, **figures}
        values, rounds = dict(numbers_of(figures)), len(result.rounds)
        tags = {key: str(table[key]) for key in ("model_sha256", "job_hash", "engine", "task", "strategy")}
        self._each(lambda tracker: tracker.numbers(values, rounds))
        self._each(lambda tracker: tracker.log_text({f"result.{k}": v for k, v in tags.items()}))
        self._each(lambda tracker: tracker.close())

    def _begin(self, after: int) -> None:
        settings = dict(settings_by_path(self.job.model_dump(mode="json"), "job"))
        for name in self.names:
            self.places[name] = name
            try:
                self._open[name] = TRACKERS[name](self.job, self.run, after)
                self.places[name] = self._open[name].place
            except lost() as error:
                _tell(name, error)
        self._each(lambda tracker: tracker.log_text(settings))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except lost() as error:
                del self._open[name]
                _tell(name, error)


def _tell(name: str, error: Exception) -> None:
    why = " ".join(str(error).split())
    logger.warning(
        "%s is left out from here on: %s; atoll track writes it when the run is complete", name, why
    )


def lost() -> tuple[type[Exception], ...]:
    """What a tracker may fail with."""
    errors: tuple[type[Exception], ...] = LOST
    if is_installed("mlflow"):
        from mlflow.exceptions import MlflowException

        errors += (MlflowException,)
    if is_installed("wandb"):
        from wandb.errors import Error

        errors += (Error,)
    return errors


def numbers_of(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in nested tables, by its path.

    >>> dict(numbers_of({"loss": 0.5, "metrics": {"accuracy": 1}, "cohort": ["a"], "set_aside": {}}))
    {'loss': 0.5, 'metrics/accuracy': 1.0}
    """
    for key, value in values.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, Mapping):
            yield from numbers_of(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def settings_by_path(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Every setting of a job that there is, by its path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from settings_by_path(value, f"{path}.{key}")
        elif value is not None:
            yield f"{path}.{key}", str(value)


def track_finished(run: Path, result: RunResult, names: Sequence[str]) -> dict[str, str]:
    """Write a complete run's directory to trackers; where each of them is.

    Raises:
        ConfigError: there is no such tracker here.
    """
    from atoll.job.job import Job

    check_trackers(names, "--to")
    tracking = Tracking(Job.load(run / "job.toml"), run, names)
    for text in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        tracking.line(json.loads(text))
    tracking.end(result)
    return tracking.places
