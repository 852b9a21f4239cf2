"""Checkpoints that a kill at any instant leaves whole: temporary name, sync, rename, sync."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from protocol.errors import ConfigError, DataError, JobError
from protocol.tensors import Tensors, from_bytes, to_bytes
from strategies import State

logger = logging.getLogger(__name__)

SCHEMA = 1
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after a round."""

    round: int
    job_hash: str
    tensors: Tensors
    state: State
    bytes_up: int
    bytes_down: int
    facts: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint durably, then let go of all but the last two.

    Raises:
        JobError: the disk is full or the folder cannot be written; older checkpoints are intact.
    """
    final = folder / f"round-{checkpoint.round:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
        for old in _rounds(folder)[:-KEEP]:
            shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise JobError(
            f"{final}: checkpoint not written ({error.strerror}); the one before it is intact"
        ) from None


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {f"model/{n}": t for n, t in checkpoint.tensors.items()}
    numbers: dict[str, float] = {}
    for name, value in checkpoint.state.items():
        if isinstance(value, torch.Tensor):
            tensors[f"state/{name}"] = value
        else:
            numbers[name] = value
    body = to_bytes(tensors)
    head = {
        "schema": SCHEMA,
        "round": checkpoint.round,
        "job_hash": checkpoint.job_hash,
        "numbers": numbers,
        "facts": checkpoint.facts,
        "bytes": [checkpoint.bytes_up, checkpoint.bytes_down],
        "tensors_sha256": hashlib.sha256(body).hexdigest(),
    }
    text = json.dumps(head)
    write_synced(folder / "tensors.safetensors", body)
    write_synced(folder / "state.json", text.encode())
    write_synced(folder / "state.sha256", hashlib.sha256(text.encode()).hexdigest().encode())


def latest(folder: Path, job_hash: str) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is named in the log and the one before it used.

    Raises:
        ConfigError: it belongs to another job, or another version of Atoll wrote it.
    """
    for path in reversed(_rounds(folder)):
        try:
            found = _read(path)
        except (OSError, ValueError, KeyError, DataError) as error:
            logger.warning("%s is damaged (%s); going back to the checkpoint before it", path, error)
            continue
        if found.job_hash != job_hash:
            raise ConfigError(f"{path}: belongs to job {found.job_hash[:12]}, this one is {job_hash[:12]}")
        return found
    return None


def _read(path: Path) -> Checkpoint:
    text = (path / "state.json").read_bytes()
    if hashlib.sha256(text).hexdigest() != (path / "state.sha256").read_text():
        raise ValueError("state.json does not match its SHA-256")
    head = json.loads(text)
    if head["schema"] != SCHEMA:
        raise ConfigError(f"{path}: checkpoint schema {head['schema']}, this version of Atoll reads {SCHEMA}")
    body = (path / "tensors.safetensors").read_bytes()
    if hashlib.sha256(body).hexdigest() != head["tensors_sha256"]:
        raise ValueError("tensors.safetensors does not match its SHA-256")
    tensors = from_bytes(body)
    state: State = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    return Checkpoint(
        round=head["round"],
        job_hash=head["job_hash"],
        tensors={n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")},
        state=state | head["numbers"],
        bytes_up=head["bytes"][0],
        bytes_down=head["bytes"][1],
        facts=head["facts"],
    )


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*")) if folder.is_dir() else []


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
