"""A run's directory: the job with its defaults, a log line per round, checkpoints, result and model."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import tomli_w

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.tensors import Tensors, file_parts
from atoll.report.run_result import RESULT_FILE, RoundLine
from atoll.server.run.checkpoint import Checkpoint, latest
from atoll.system.durable_files import append_synced, is_begun, remove, replace_synced, sync_folder

logger = logging.getLogger(__name__)

UPDATES = "updates"
"""The folder of large updates in a run's directory."""
DATA_HASHES = "data_hashes.json"
"""The file of a simulation that says with which data it began."""
DATA_SCHEMA = 1
SHOWN_CLIENTS = 5
"""Clients whose data changed that a line names."""


@dataclass
class RunDirectory:
    """An open run directory, locked so that one process at a time runs in it; leaving the context unlocks it.

    If the job is refused before `commit`, everything stays as it was: new files are removed, and an old run
    that `force` would replace is untouched. `data_hashes` has the data of a simulation's clients, by name.
    """

    path: Path
    lock: TextIO
    job: Job
    made: tuple[Path, ...]
    is_new: bool
    replaces: bool = False
    settled: bool = False
    data_hashes: Mapping[str, str] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        job: Job,
        *,
        resume: bool,
        force: bool,
        data_hashes: Mapping[str, str] | None = None,
    ) -> RunDirectory:
        """Create the directory, or open an existing one to `resume` its run or to replace it (`force`).

        Raises:
            ConfigError: it cannot be written, holds another run, or another process runs in it.
        """
        check_available(path, job, resume=resume, force=force)
        made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
            is_new = not (path / "job.toml").is_file()
            replaces = force and not is_new
            directory = cls(path, lock, job, made, is_new, replaces, data_hashes=data_hashes)
            if is_new:
                directory._write_job()
            else:
                sync_folder(path)  # whoever wrote job.toml may have been killed before that
        except OSError as error:
            _remove_empty(made)
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
        except ConfigError:
            _remove_empty(made)
            raise
        return directory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.settled and self.is_new:
            for name in ("job.toml", ".lock"):
                remove(self.path / name)
            _remove_empty(self.made)
        if self.settled:
            _remove_updates(self.path)
        self.lock.close()

    def commit(self) -> None:
        """Remove an old run that is to be replaced, and keep all files from now on: the job can run."""
        if self.replaces:
            _clear(self.path)
            self._write_job()
        _remove_updates(self.path)
        if self.data_hashes is not None:
            self._write_data_hashes(self.data_hashes)
        self.settled = True

    def check_same_data(self) -> None:
        """Refuse to go on with other data; a run without a record of its data, as older ones, is not checked.

        Raises:
            ConfigError: the data of some clients has changed; the line names them.
        """
        before = self._read_data_hashes()
        if before is None or self.data_hashes is None or before == self.data_hashes:
            return
        names = dict.fromkeys([*before, *self.data_hashes])
        changed = [name for name in names if before.get(name) != self.data_hashes.get(name)]
        more = f" and {len(changed) - SHOWN_CLIENTS} more" if len(changed) > SHOWN_CLIENTS else ""
        raise ConfigError(
            f"{self.path}: cannot resume with changed data: {', '.join(changed[:SHOWN_CLIENTS])}{more};"
            " put back what was there, or start it anew with another --out"
        )

    def _read_data_hashes(self) -> dict[str, str] | None:
        path = self.path / DATA_HASHES
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text("utf-8"))
            schema, hashes = record["schema"], dict(record["hashes"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path}: damaged: {error}; without it the data is not compared") from None
        if schema != DATA_SCHEMA:
            raise ConfigError(f"{path}: schema {schema}, this version of Atoll reads {DATA_SCHEMA}")
        return hashes

    def _write_data_hashes(self, hashes: Mapping[str, str]) -> None:
        """Only the owner may read them: that of a single example could be compared with a guess's."""
        content = json.dumps({"schema": DATA_SCHEMA, "hashes": dict(hashes)}) + "\n"
        path = self.path / DATA_HASHES
        if not path.is_file() or path.read_text("utf-8") != content:
            replace_synced(path, content.encode(), 0o600)

    def _write_job(self) -> None:
        try:
            replace_synced(self.path / "job.toml", job_toml(self.job).encode())
        except OSError as error:
            if self.is_new:
                remove(self.path / ".lock")
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from None

    def append_metrics(self, line: RoundLine) -> None:
        """Append a round's line to the log; on a full disk the line is lost and the run continues."""
        try:
            content = (json.dumps(line) + "\n").encode()
            append_synced(self.log, content, durable=False)
        except OSError as error:
            logger.warning("%s: metrics.jsonl not written (%s)", self.path, error.strerror)

    def truncate_log(self, round: int) -> list[RoundLine]:
        """The log's lines up to a round; later ones are removed, since their rounds will be repeated."""
        path, lines = self.log, list[RoundLine]()
        for text in path.read_text("utf-8").splitlines() if path.is_file() else []:
            try:
                line: RoundLine = json.loads(text)
            except ValueError:  # the kill came while it was written
                continue
            if line["round"] <= round:
                lines.append(line)
        if len(lines) != round:
            logger.warning("%s: lines of %d rounds are missing", path, round - len(lines))
        replace_synced(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return lines

    @property
    def log(self) -> Path:
        """The file of the rounds' lines."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def updates(self) -> Path:
        """The folder into which large updates are written; each file loses its name once it is mapped."""
        return self.path / UPDATES

    def latest_checkpoint(self, job_hash: str) -> Checkpoint | None:
        """The newest valid checkpoint, or None."""
        return latest(self.checkpoints, job_hash)

    def save_model(self, tensors: Tensors, about: dict[str, Any]) -> None:
        """Write the final tensors, and in `about` what is needed to load them."""
        folder = self.path / "model"
        folder.mkdir(exist_ok=True)
        replace_synced(folder / "model.safetensors", file_parts(tensors))
        replace_synced(folder / "model.json", json.dumps(about, indent=2).encode())


def check_available(path: Path, job: Job, *, resume: bool, force: bool) -> None:
    """Check whether a run of this job may be written to `path`, without changing anything.

    Raises:
        ConfigError: it holds another run or something else, or there is nothing to resume.
    """
    try:
        if resume:
            if not (path / "job.toml").is_file():
                raise ConfigError(f"{path}: nothing to resume, there is no job.toml; leave --resume out")
            _check_same_job(path / "job.toml", job)
        elif force and _is_taken(path) and not (path / "job.toml").is_file():
            raise ConfigError(f"{path}: no run directory (no job.toml), --force replaces nothing else")
        elif not force and _is_taken(path):
            raise ConfigError(
                f"{path}: exists and is not empty; use --resume to go on, --force to start anew,"
                " or another --out"
            )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _is_taken(path: Path) -> bool:
    """Whether the folder holds more than a run that was killed at its start leaves."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    return is_begun(path, "job.toml")


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove the empty ones among the folders, the innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def job_toml(job: Job) -> str:
    """The job with every default, as TOML that runs it again."""
    return tomli_w.dumps(_without_none(job.model_dump(mode="json")))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_none_in(value) for key, value in table.items() if value is not None}


def _without_none_in(value: Any) -> Any:
    """A value without keys whose value is None, which TOML cannot express."""
    if isinstance(value, dict):
        return _without_none(value)
    return [_without_none_in(one) for one in value] if isinstance(value, list) else value


def _check_same_job(path: Path, job: Job) -> None:
    before = Job.load(path)
    if before.hash == job.hash:
        return
    old, new = before.model_dump(mode="json"), job.model_dump(mode="json")
    changed = sorted(_differences(old, new))
    raise ConfigError(
        f"{path.parent}: cannot resume with a changed job: {', '.join(changed)};"
        " start it anew with another --out"
    )


def _differences(old: Any, new: Any, key: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {*old, *new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key


def _remove_updates(path: Path) -> None:
    """Remove the folder of updates, with files that a killed run left in it."""
    shutil.rmtree(path / UPDATES, ignore_errors=True)


def _locked(path: Path) -> TextIO:
    """Lock the directory by its lock file; the lock is released when the process ends, however it ends."""
    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.path.samestat(os.fstat(file.fileno()), (path / ".lock").stat())
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:  # held, or its holder was refused and took it away
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(f"{path}: another process runs in it (pid {holder})")
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _clear(path: Path) -> None:
    """Remove the files that a run writes, and no others."""
    for name in ("checkpoints", "model", "ledgers", "memory", "tensorboard", "sums"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (
        "metrics.jsonl",
        DATA_HASHES,
        RESULT_FILE,
        "report.html",
        "ledger.jsonl",
        "audit.json",
        "forgotten.json",
    ):
        (path / name).unlink(missing_ok=True)
