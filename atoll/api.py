"""What `import atoll` offers: jobs, runs, sweeps and exports, from Python as from the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.job.job import Job
from atoll.plugins import load_files

if TYPE_CHECKING:
    from atoll.report.run_result import RoundLine, RunResult
    from atoll.sim.search.backbone_ranking import RankedBackbone
    from atoll.strategies import Strategy


def load_job(path: str | Path, changes: Mapping[str, Any] | None = None) -> Job:
    """The job in the TOML file at `path`, validated, with some keys changed.

    `changes` maps keys with dots to values, as `--set` does; the job's defaults are filled in.

    >>> load_job("jobs/bbc-news.toml", {"train.lr": 0.05, "federation.cohort": 5}).train.lr
    0.05

    Raises:
        ConfigError: one line that names the file, the key, what was found and what was expected.
    """
    from atoll.cli.run import load

    return load(Path(path), as_overrides(changes or {}))


def simulate(
    job: Job | str | Path,
    out: str | Path | None = None,
    *,
    engine: str = "inline",
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    track: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    strategy: Strategy | None = None,
) -> Run:
    """Run a whole federation on this machine, as `atoll simulate` does, and return the finished run.

    `job` is a job or the path of a job file. Without `out` the run directory is runs/NAME, or the next free
    name after it; `resume` continues the run in `out`, `force` replaces it. `engine` is inline, loop, cohort
    or ray, `workers` the number of processes or threads; neither changes the final bits, except for cohort.
    `track` names trackers that log the run. `plugins` are Python files with extensions that the job names.
    A `strategy` is used instead of the job's: any object with `begin`, `plan` and `merge`
    (`atoll.strategies.Strategy`); result.json then has its class's name.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "job.toml").write_text('''
    ... name = "digits"
    ... seed = 1
    ... task = { name = "image-classification" }
    ... data = { source = "digits" }
    ... backbone = { name = "raw:pixels", image_size = 8 }
    ... federation = { clients = 4, rounds = 2 }
    ... ''')
    >>> run = simulate(folder / "job.toml", folder / "run")  # doctest: +ELLIPSIS
    counts ...examples read...
    >>> len(run.rounds), run.metrics["federated"]["accuracy"] > 0.3
    (2, True)

    Raises:
        InputError: the job or its data is wrong; nothing was run.
        JobError: the run could not go on.
    """
    from atoll.cli.run import run_here

    load_files(plugins)
    job = job if isinstance(job, Job) else load_job(job)
    where = run_here(
        job,
        Path(out) if out is not None else None,
        default=Path("runs") / job.name,
        engine=engine,
        workers=workers,
        resume=resume,
        force=force,
        track=track,
        strategy=strategy,
    )
    return Run(where)


@dataclass(frozen=True)
class Run:
    """A finished run, in its directory."""

    folder: Path

    @property
    def result(self) -> RunResult:
        """The run's `result.json`, as an object with a field for each key.

        Raises:
            ConfigError: there is no finished run.
        """
        from atoll.cli.inspect import read_result

        return read_result(self.folder)

    @property
    def job(self) -> Job:
        """The run's job, with every default filled in.

        Raises:
            ConfigError: the directory has no valid job.toml.
        """
        return Job.load(self.folder / "job.toml")

    @property
    def rounds(self) -> list[RoundLine]:
        """A `RoundLine` of `atoll.report.run_result` per round: loss, metrics, seconds, bytes."""
        lines = (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float | None]]:
        """Metrics by name, of the model ("federated") and of each baseline that was measured."""
        from atoll.report.comparison import comparison_of

        return comparison_of(self.result).rows

    @property
    def report(self) -> Path:
        """The path of the HTML page that shows the run."""
        return self.folder / "report.html"

    def predict(
        self,
        inputs: Sequence[str | Path],
        out: str | Path | None = None,
        *,
        overlay: bool = False,
        cluster: int | None = None,
    ) -> list[dict[str, Any]]:
        """The model's answers: a table for each text or file in `inputs`, and for each file of a folder.

        Large results are arrays: a segmenter's `mask` (uint8, class indices) and `scores` (float32, the
        probability of each pixel's class), both [height, width] of the picture. With `out`, masks, boxes and
        forecasts are also written to files there, whose paths are in `files`; with `overlay`, so are pictures
        with their masks drawn on them. `cluster` is the model's number, in runs with a model per cluster.

        Raises:
            DataError: an input cannot be read.
        """
        from atoll.cli.predict import answers_of

        place = Path(out) if out is not None else None
        texts = [str(one) for one in inputs]
        return list(
            answers_of(self.folder, texts, place, write=out is not None, overlay=overlay, cluster=cluster)
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_new_tokens: int | None = None,
    ) -> str:
        """A language model's answer to a conversation, as text.

        `messages` have `role` and `content`; the last one is a user's. With `temperature` 0 each token is the
        likeliest one. Above 0, tokens are drawn among the fewest likeliest ones whose probabilities sum to
        `top_p`; the same messages and seed (by default the job's) give the same answer. `max_new_tokens`
        limits its length. If the conversation is too long for the model, its oldest turns are left out, which
        is logged.

        Raises:
            ConfigError: the run has no language model or no chat template, or a value is out of range.
            DataError: the messages are malformed, or the last one alone is too long.
        """
        from atoll.trained import chat_with, decoding

        talker = chat_with(self.folder)
        how = decoding(talker, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        return talker.answer([dict(message) for message in messages], how, seed).text

    def export(
        self,
        format: str,
        out: str | Path | None = None,
        *,
        data: str | Path | None = None,
        max_drop: float = 0.01,
        force: bool = False,
        prune: float | None = None,
        prune_kind: str | None = None,
        cluster: int | None = None,
    ) -> Path:
        """Write the model in a format for other programs, and return the folder that holds it.

        `format` is one of `atoll export --format`. `data` is a file or folder on which the exported model is
        compared with the run's. `prune` leaves out this part of the weights, from 0 to 1, in the way that
        `prune_kind` says. `cluster` is the model's number, in runs with a model per cluster. `force` replaces
        an earlier export.

        Raises:
            ConfigError: this run can't be exported in this format.
            JobError: the primary metric falls by more than `max_drop`; nothing was written.
        """
        from atoll.cli.export import export

        folder = Path(out) if out is not None else None
        measured_on = Path(data) if data is not None else None
        return export(self.folder, format, folder, measured_on, max_drop, force, prune, prune_kind, cluster)


@dataclass(frozen=True)
class Exported:
    """A loaded export in the format torchao-int8."""

    folder: Path
    model: Any
    """The network, a torch module in eval mode; it takes tensors by name, as the ONNX file does."""
    learner: Any

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """The model's answers, a table for each text or file, as `Run.predict` returns them.

        Raises:
            DataError: an input cannot be read.
        """
        import torch

        task = self.learner.task
        raw = [task.parse_input(texts) for texts in inputs]
        with torch.inference_mode():
            batch = self.model.backbone.preprocess_and_collate(raw)
            data_info = self.learner.data_info
            if task.uses_pooled_features:
                answers: list[dict[str, Any]] = task.format_predictions(self.model.predict(batch), data_info)
            else:
                answers = task.answers(self.model, batch, raw, data_info)
        return answers


def load_export(folder: str | Path) -> Exported:
    """Load the model of a torchao export from its folder; the run is not needed.

    Raises:
        ConfigError, WeightsError: the folder has no such model, or its files are damaged.
    """
    from atoll.export.torchao import read_model

    learner, model = read_model(Path(folder))
    return Exported(Path(folder), model, learner)


@dataclass(frozen=True)
class Sweep:
    """A folder of runs that differ in some keys."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        """One table per run, with the columns of sweep.csv as text."""
        with (self.folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def picture(self) -> Path:
        """The path of the plot of all runs and their Pareto frontier."""
        return self.folder / "frontier.png"


def sweep(
    job: str | Path,
    vary: Mapping[str, Sequence[Any]],
    out: str | Path | None = None,
    *,
    seeds: int | None = None,
    folds: int | None = None,
    workers: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Sweep:
    """Run a grid of a job's variations over several seeds or folds, as `atoll sweep` does.

    `vary` maps keys with dots to lists of values; every combination is run. `changes` apply to all runs.
    `workers` is how many runs are computed at the same time. Without `out` the folder follows the job's name.

    Raises:
        InputError: a key or a value is wrong; nothing was run.
        JobError: some runs failed; the same call tries them again.
    """
    from atoll.cli.sweep import sweep as run_sweep

    grid = [f"{key}={','.join(as_text(value) for value in values)}" for key, values in vary.items()]
    folder = Path(out) if out is not None else None
    return Sweep(run_sweep(Path(job), grid, seeds, folds, folder, workers, as_overrides(changes or {})))


@dataclass(frozen=True)
class Search:
    """A folder of trials of a job's settings."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        """One table per trial, with the columns of trials.csv as text."""
        with (self.folder / "trials.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def best(self) -> Job:
        """The best trial's job, to simulate or submit."""
        return Job.load(self.folder / "best.toml")

    @property
    def picture(self) -> Path:
        """The path of the plot of values over trials."""
        return self.folder / "trials.png"


def tune(
    job: str | Path,
    space: Mapping[str, Sequence[Any] | str] | None = None,
    out: str | Path | None = None,
    *,
    trials: int = 20,
    seeds: int = 1,
    seed: int | None = None,
    workers: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Search:
    """Search for the settings with the best metric on clients' validation splits, as `atoll tune` does.

    `space` maps keys to a list of values or a range: `{"train.epochs": [1, 4], "train.lr": "0.01..3,log"}`.
    Each of the `trials` is run with `seeds` seeds; `seed` is that of the search itself. `changes` apply to
    all trials, and `workers` is how many runs are computed at the same time.

    Raises:
        InputError: a key or a value is wrong; nothing was run.
        JobError: trials failed, or no trial has a value.
    """
    from atoll.cli.tune import tune as search

    keys = space or {}
    ranges = [f"{key}={values}" for key, values in keys.items() if isinstance(values, str)]
    lists = {key: values for key, values in keys.items() if not isinstance(values, str)}
    vary = [f"{key}={','.join(as_text(value) for value in values)}" for key, values in lists.items()]
    folder, overrides = Path(out) if out is not None else None, as_overrides(changes or {})
    return Search(search(Path(job), vary, ranges, trials, seeds, seed, folder, workers, overrides))


def advise(
    job: Job | str | Path, backbones: Sequence[str] | None = None, *, head: int | None = None
) -> list[RankedBackbone]:
    """Backbones ranked by how well their features fit a job's data, the best LogME first, as `atoll advise`.

    `backbones` are names as in `backbone.name`; None ranks those that are available here. The ranking uses
    `head` examples, by default 2,000.

    Raises:
        InputError: the job can't be advised on, or a backbone is not available.
    """
    from atoll.cli.tune import advised

    return advised(job if isinstance(job, Job) else load_job(job), backbones, head)


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes in the form that `--set` takes: `key=value`."""
    return [f"{key}={as_text(value)}" for key, value in changes.items()]


def as_text(value: Any) -> str:
    """A value in TOML's notation, but a string without quotes."""
    return value if isinstance(value, str) else json.dumps(value)
