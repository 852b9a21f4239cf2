"""A grid of runs of one job: every combination of the varied values, and every combination with each seed.

A run lies in a folder of its own whose name ends with its job's hash, so that a grid that is typed
again, or another one with some of its runs, takes what is there.
"""

from __future__ import annotations

import copy
import fcntl
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.toml import apply_override, read_toml
from atoll.report.run_result import RunResult
from atoll.system.durable_files import is_begun, replace_synced

FORMAT = 1
"""Of `sweep.json`."""

EPSILON = "privacy.epsilon"
"""The key that may be `inf`: the same job without privacy."""

THRESHOLD = "secure_threshold"
"""Of `[federation]`: it goes with a secure sum and has no meaning without."""

HASH = 8
"""Letters of a job's hash that its folder's name ends with."""

Values = Mapping[str, Any]
"""What one run has for each varied key; None for a key that has no meaning in it."""


@dataclass(frozen=True)
class Grid:
    """What varies: for each key its values, as they were typed, and how many seeds there are.

    With `folds` every combination also runs once for each fold of the clients' data.
    """

    keys: Mapping[str, tuple[str, ...]]
    seeds: int
    folds: int | None = None

    @classmethod
    def of(cls, vary: Sequence[str], seeds: int, folds: int | None = None) -> Grid:
        """From `key=a,b,c` texts.

        Raises:
            ConfigError: one of them has another form, or something is there twice.
        """
        keys: dict[str, tuple[str, ...]] = {}
        for text in vary:
            key, equals, values = text.partition("=")
            key = key.strip()
            values_of_key = split_values(values)
            if not equals or not key or not all(values_of_key):
                raise ConfigError(f"--vary {text}: expected key=value,value,..., such as train.lr=0.1,0.3")
            if key == "seed":
                raise ConfigError("--vary seed: expected --seeds N; every combination runs with N seeds")
            if key in ("data.folds", "data.fold"):
                raise ConfigError(f"--vary {key}: expected --folds K; every combination runs with K folds")
            if key in keys:
                raise ConfigError(f"--vary {key}: found twice, expected all its values in one --vary")
            if len({format_value(as_value(v)) for v in values_of_key}) < len(values_of_key):
                raise ConfigError(f"--vary {text}: a value is there twice, expected different ones")
            keys[key] = tuple(values_of_key)
        if not keys and folds is None:
            raise ConfigError(
                "--vary: missing, expected what the runs differ in, such as"
                " --vary privacy.epsilon=0.5,1,2,inf"
            )
        return cls(keys, seeds, folds)

    def combinations(self) -> Iterator[dict[str, str]]:
        """Every combination of the values as they were typed; the last key varies fastest."""
        for values in product(*self.keys.values()):
            yield dict(zip(self.keys, values, strict=True))


def split_values(text: str) -> list[str]:
    """The parts between commas that are in no brackets, braces or quotes.

    >>> split_values('0.5, inf,{ kind = "dirichlet", alpha = 0.5 }')
    ['0.5', 'inf', '{ kind = "dirichlet", alpha = 0.5 }']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def as_value(text: str) -> Any:
    """TOML, or else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@dataclass(frozen=True)
class Base:
    """The job that everything is a variation of, as a table; `folder` is where its paths start."""

    table: dict[str, Any]
    origin: str
    folder: Path

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str], varied: Sequence[str]) -> Base:
        """A job file with what `--set` changes of it.

        Raises:
            ConfigError: it can't be read, or a key is in both --set and --vary.
        """
        table = read_toml(path)
        for override in overrides:
            key = override.partition("=")[0].strip()
            if key in varied:
                raise ConfigError(f"{key}: in --set and in --vary, expected it in one of them")
            apply_override(table, override)
        return cls(table, str(path), path.parent)

    @property
    def name(self) -> str:
        """The job's name, for the folder that the sweep goes to."""
        name = self.table.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigError(f"{self.origin}: name: expected letters, digits, '.', '_', '-', found {name!r}")
        return name

    def job(self, texts: Mapping[str, str]) -> tuple[Values, Job]:
        """(what this run has for each varied key, its job).

        Raises:
            ConfigError: in one line, what is wrong with the key or its value.
        """
        table = copy.deepcopy(self.table)
        is_private = not is_infinite(texts.get(EPSILON))
        for key, text in texts.items():
            if is_private or not _is_of_a_promise(key):
                apply_override(table, f"{key}={text}", option="--vary")
        values: dict[str, Any] = {key: as_value(text) for key, text in texts.items()}
        if not is_private:
            table["privacy"] = {"unit": "none"}
            values |= {key: None for key in texts if _is_of_a_promise(key)} | {EPSILON: math.inf}
        if _sums_securely(self.table) and not _sums_securely(table):
            table["federation"].pop(THRESHOLD, None)
        return values, Job.parse(table, origin=self.origin, folder=self.folder)


def is_infinite(text: str | None) -> bool:
    """Whether a value of epsilon means that there is no privacy."""
    return text is not None and as_value(text) == math.inf


def _is_of_a_promise(key: str) -> bool:
    return key.startswith("privacy.") or key == f"federation.{THRESHOLD}"


def _sums_securely(table: Mapping[str, Any]) -> bool:
    """As `atoll.job.privacy.sums_securely`, of a table that nobody has validated yet."""
    federation, privacy = table.get("federation"), table.get("privacy")
    privacy = privacy if isinstance(privacy, dict) else {}
    promises = [privacy, *(of for of in privacy.values() if isinstance(of, dict))]
    is_masked = isinstance(federation, dict) and bool(federation.get("secure_aggregation"))
    return is_masked or any(promise.get("where") == "distributed" for promise in promises)


@dataclass(frozen=True)
class Planned:
    """One run of the grid: what it has for each varied key, its job, and its folder's name."""

    values: Values
    job: Job

    @property
    def folder(self) -> str:
        set_values = {key.rpartition(".")[2]: v for key, v in self.values.items() if v is not None}
        parts = [f"{key}-{format_value(value)}" for key, value in set_values.items()]
        readable = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part) for part in parts)
        fold = "" if self.job.data.folds is None else f"_fold-{self.job.data.fold}"
        return f"{readable[:80]}_seed-{self.job.seed}{fold}_{self.job.hash[:HASH]}".lstrip("_")

    @property
    def description(self) -> str:
        """How a person would name it."""
        fold = [] if self.job.data.folds is None else [f"fold {self.job.data.fold}"]
        return ", ".join([*_set_values(self.values), f"seed {self.job.seed}", *fold])


def format_value(value: Any) -> str:
    """A value in words.

    >>> [format_value(one) for one in (0.50, float("inf"), "client", None)]
    ['0.5', 'inf', 'client', '-']
    """
    if value is None:
        return "-"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def describe_combination(values: Values) -> str:
    """The values that have a meaning, each with its key."""
    return ", ".join(_set_values(values))


def _set_values(values: Values) -> list[str]:
    return [f"{key} {format_value(value)}" for key, value in values.items() if value is not None]


def planned(base: Base, grid: Grid) -> list[Planned]:
    """Every run once, seed by seed and fold by fold; two combinations that make the same job are one run.

    Raises:
        ConfigError: one of them is no valid job.
    """
    runs: dict[str, Planned] = {}
    combined = [base.job(texts) for texts in grid.combinations()]
    for offset, fold in product(range(grid.seeds), range(grid.folds or 1)):
        for values, job in combined:
            table = job.model_dump(mode="json") | {"seed": job.seed + offset}
            if grid.folds is not None:
                table["data"] |= {"folds": grid.folds, "fold": fold}
            repeated = Job.parse(table, origin=base.origin)
            runs.setdefault(repeated.hash, Planned(values, repeated))
    return list(runs.values())


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's runs lie, and what it says of itself in `sweep.json`."""

    path: Path

    @property
    def about(self) -> Path:
        return self.path / "sweep.json"

    def check(self, base: Base) -> None:
        """Raises ConfigError unless the folder is new, or empty, or of a sweep of the same job."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: found a file, expected a folder; choose another --out")
        if not self.about.is_file():
            if is_begun(self.path, self.about.name):
                raise ConfigError(f"{self.path}: not empty and no sweep's folder; choose another --out")
            return
        known = self._read()["base"]
        if known != _as_json(base.table):
            changed = ", ".join(sorted(_differences(known, _as_json(base.table))))
            raise ConfigError(f"{self.path}: holds a sweep of another job ({changed}); choose another --out")

    def grid(self) -> Grid:
        """The grid that was asked for last."""
        about = self._read()
        return Grid(
            {key: tuple(texts) for key, texts in about["vary"].items()},
            int(about["seeds"]),
            about.get("folds"),
        )

    def _read(self) -> dict[str, Any]:
        if not self.about.is_file():
            raise ConfigError(f"{self.path}: no sweep's folder (no sweep.json), expected one to draw from")
        try:
            about: dict[str, Any] = json.loads(self.about.read_text("utf-8"))
        except ValueError:
            about = {}
        if about.get("format") != FORMAT or not {"base", "vary", "seeds"} <= set(about):
            raise ConfigError(f"{self.about}: damaged, or of another version; choose another --out")
        return about

    def record(self, base: Base, grid: Grid) -> None:
        """Write down which job this is a sweep of, and the grid."""
        vary = {"vary": dict(grid.keys), "seeds": grid.seeds, "folds": grid.folds}
        about = {"format": FORMAT, "base": _as_json(base.table), **vary}
        replace_synced(self.about, json.dumps(about, indent=2).encode())

    def of(self, run: Planned) -> Path:
        """The run's folder; one of another grid, with another name, is the run's if its hash is."""
        known = sorted(self.path.glob(f"*_{run.job.hash[:HASH]}"))
        return known[0] if known else self.path / run.folder

    def result(self, run: Planned) -> RunResult | None:
        """What the run came to, if it is complete."""
        return RunResult.of_job(self.of(run), run.job.hash)


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """For the time of the block, no other sweep or search (`what`) runs in that folder.

    Raises:
        ConfigError: one does, or the folder can't be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise ConfigError(f"{path}: another {what} runs in it") from None
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _as_json(table: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(table, default=str))


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {*old, *new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key
