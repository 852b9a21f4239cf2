"""A run's directory: the resolved job, a line a round, checkpoints, the result and the model."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import tomli_w

from protocol.errors import ConfigError, JobError
from protocol.job import Job
from protocol.tensors import Tensors, to_bytes
from server.checkpoint import Checkpoint, latest, replace_synced, save

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """Holds the directory's lock for as long as it lives; one process runs in it at a time."""

    path: Path
    lock: TextIO

    @classmethod
    def open(cls, path: Path, job: Job, *, resume: bool, force: bool) -> RunDirectory:
        """Create the directory, or take an old one over with `resume` (go on) or `force` (start anew).

        Raises:
            ConfigError: it cannot be written, holds another run, or another process runs in it.
        """
        if resume and not (path / "job.toml").is_file():
            raise ConfigError(f"{path}: nothing to resume, there is no job.toml")
        if not (resume or force) and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path}: exists and is not empty; use --resume to go on, --force to start anew"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
            if resume:
                _check_same_job(path / "job.toml", job)
            elif force:
                _clear(path)
            replace_synced(path / "job.toml", job_toml(job).encode())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
        return cls(path, lock)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a round's line; a full disk costs the line, not the run."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("%s: metrics.jsonl not written (%s)", self.path, error.strerror)

    def rewrite_metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        """Bring the file back to what the checkpoint knows."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_synced(self.path / "metrics.jsonl", text.encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make a round durable."""
        save(self.path / "checkpoints", checkpoint)

    def latest_checkpoint(self, job_hash: str) -> Checkpoint | None:
        """The newest whole checkpoint, if any."""
        return latest(self.path / "checkpoints", job_hash)

    def save_model(self, tensors: Tensors, about: dict[str, Any]) -> None:
        """The final tensors, and what is needed to load them."""
        folder = self.path / "model"
        folder.mkdir(exist_ok=True)
        replace_synced(folder / "model.safetensors", to_bytes(tensors))
        replace_synced(folder / "model.json", json.dumps(about, indent=2).encode())

    def save_result(self, result: dict[str, Any]) -> None:
        """`result.json`; its presence says that the run is complete."""
        try:
            replace_synced(self.path / "result.json", json.dumps(result, indent=2, allow_nan=False).encode())
        except OSError as error:
            raise JobError(f"{self.path / 'result.json'}: not written ({error.strerror})") from None


def job_toml(job: Job) -> str:
    """The job with every default written out, as TOML that replays it."""
    return tomli_w.dumps(_without_none(job.model_dump(mode="json")))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _check_same_job(path: Path, job: Job) -> None:
    before = Job.load(path)
    if before.hash == job.hash:
        return
    old, new = before.model_dump(mode="json"), job.model_dump(mode="json")
    changed = sorted(_differences(old, new))
    raise ConfigError(f"{path.parent}: cannot resume with a changed job: {', '.join(changed)}")


def _differences(old: Any, new: Any, key: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {*old, *new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key


def _locked(path: Path) -> TextIO:
    """Take the directory's lock file; it is given back when the process ends, however it ends."""
    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(f"{path}: another process runs in it (pid {holder})") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in ("metrics.jsonl", "result.json", "report.html"):
        (path / name).unlink(missing_ok=True)
