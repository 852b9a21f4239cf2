"""Checkpoints that stay valid if the process is killed at any instant: temporary name, sync, rename, sync."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atoll.errors import ConfigError, JobError
from atoll.protocol.tensors import Tensors, aligned, file_parts, size_of, tensors_sha256
from atoll.strategies.strategy import State
from atoll.system.durable_files import remove, replace_synced, sync_file, temporary_of
from atoll.system.memory import trim_freed_memory

logger = logging.getLogger(__name__)

SCHEMA = 1
SECRET = "secret."
"""The prefix of state entries that only the run's owner may read."""
KEEP = 2
EVERY = 0.25
"""The least time between two checkpoints, in seconds."""


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to resume a run after `round`.

    `tensors` is the global model by name. `state` holds the flat states of strategy, selection rule, early
    stopping and privacy, each under its own prefix. Bytes are totals since the run's start, and `data_info`
    is what the clients agreed on. `job_hash` binds the checkpoint to its job.
    """

    round: int
    job_hash: str
    tensors: Tensors
    state: State
    bytes_up: int
    bytes_down: int
    data_info: dict[str, Any]

    @property
    def mode(self) -> int:
        """The permission bits of its file: only the owner may read it if it has secret entries."""
        return 0o600 if any(name.startswith(SECRET) for name in self.state) else 0o666


@dataclass
class CheckpointManager:
    """Saves the rounds' checkpoints in the background, at most one every `EVERY` seconds.

    Waiting for the disk would take longer than rounds of milliseconds. A kill loses at most `EVERY` seconds
    and the rounds that pass while a checkpoint is being written. With `waits` every round is on disk before
    the next one begins. The run's `log` is synced before a checkpoint that relies on its lines.
    """

    folder: Path
    waits: bool = False
    log: Path | None = None
    last: Checkpoint | None = None
    saved: int = 0
    began: float = -math.inf
    _writing: list[Future[int]] = field(default_factory=list)

    def save_async(self, checkpoint: Checkpoint) -> None:
        """Remember a complete round's checkpoint, and begin to save it if the last one is old enough.

        Raises:
            JobError: as `save`, for the previous checkpoint.
        """
        self.last = checkpoint
        if self.waits:
            self.flush()
            return
        if self._writing and not self._writing[0].done():
            return
        if time.monotonic() - self.began >= EVERY:
            self._finish()
            self.began = time.monotonic()
            self._writing.append(self._writer.submit(self._save, checkpoint))

    def flush(self) -> None:
        """Save the last complete round's checkpoint, and wait until it is on disk.

        Raises:
            JobError: as `save`.
        """
        self._finish()
        if self.last is not None and self.last.round != self.saved:
            self.saved, self.began = self._save(self.last), time.monotonic()

    def _save(self, checkpoint: Checkpoint) -> int:
        save(self.folder, checkpoint, self.log)
        trim_freed_memory(size_of(checkpoint.tensors))
        return checkpoint.round

    def _finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        while self._writing:
            self.saved = self._writing.pop().result()

    @cached_property
    def _writer(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "checkpoints")


def save(folder: Path, checkpoint: Checkpoint, log: Path | None = None) -> None:
    """Write one checkpoint durably, after syncing the log; then delete all but the last two checkpoints.

    Raises:
        JobError: the disk is full or the folder cannot be written; older checkpoints are intact.
    """
    final = folder / f"round-{checkpoint.round:06d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if log is not None:
            sync_file(log)
        replace_synced(final, _encoded(checkpoint), checkpoint.mode)
        for old in _rounds(folder)[:-KEEP]:
            remove(old)
    except OSError as error:
        remove(temporary_of(final))
        raise JobError(
            f"{final}: checkpoint not written ({error.strerror}); the one before it is intact"
        ) from None


def _encoded(checkpoint: Checkpoint) -> Iterator[bytes | memoryview]:
    """The parts of a checkpoint's safetensors file; numbers and text are in its metadata, with their hash."""
    tensors = {f"model/{n}": t for n, t in checkpoint.tensors.items()}
    numbers: dict[str, float] = {}
    for name, value in checkpoint.state.items():
        if isinstance(value, torch.Tensor):
            tensors[f"state/{name}"] = value
        else:
            numbers[name] = value
    head = json.dumps(
        {
            "schema": SCHEMA,
            "round": checkpoint.round,
            "job_hash": checkpoint.job_hash,
            "numbers": numbers,
            "facts": checkpoint.data_info,
            "bytes": [checkpoint.bytes_up, checkpoint.bytes_down],
            "tensors_sha256": tensors_sha256(tensors),
        }
    )
    return file_parts(tensors, {"head": head, "head_sha256": hashlib.sha256(head.encode()).hexdigest()})


def latest(folder: Path, job_hash: str) -> Checkpoint | None:
    """The newest valid checkpoint, or None; damaged ones are logged and skipped.

    Raises:
        ConfigError: it belongs to another job, or another version of Atoll wrote it.
    """
    for path in reversed(_rounds(folder)):
        try:
            checkpoint = _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("%s is damaged (%s); going back to the checkpoint before it", path, error)
            continue
        if checkpoint.job_hash != job_hash:
            raise ConfigError(
                f"{path}: belongs to job {checkpoint.job_hash[:12]}, this one is {job_hash[:12]}"
            )
        return checkpoint
    return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors: Tensors = {name: aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    text = metadata["head"]
    if hashlib.sha256(text.encode()).hexdigest() != metadata["head_sha256"]:
        raise ValueError("its head does not match its SHA-256")
    head = json.loads(text)
    if head["schema"] != SCHEMA:
        raise ConfigError(f"{path}: checkpoint schema {head['schema']}, this version of Atoll reads {SCHEMA}")
    if tensors_sha256(tensors) != head["tensors_sha256"]:
        raise ValueError("its tensors do not match their SHA-256")
    state: State = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    return Checkpoint(
        round=head["round"],
        job_hash=head["job_hash"],
        tensors={n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")},
        state=state | head["numbers"],
        bytes_up=head["bytes"][0],
        bytes_down=head["bytes"][1],
        data_info=head["facts"],
    )


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors")) if folder.is_dir() else []
