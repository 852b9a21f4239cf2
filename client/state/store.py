"""What clients keep from one round of a run to the next, such as what compression lost.

A client's state is a flat dict of tensors, kept with the round that left it. Training in a round takes
the newest state of the rounds before it, whatever was kept since: a request that comes again, a round
that is tried again and a run that goes on from a checkpoint find what they found the first time. With
a folder a state is on the disk before the update leaves, in files that only their owner can read.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from atoll.errors import DataError, JobError
from atoll.protocol.tensors import Tensors, tensors_sha256, to_bytes
from atoll.system.durable_files import remove, replace_all

logger = logging.getLogger(__name__)

ROUNDS_KEPT = 3
"""States of a client that are kept: the last two checkpoints of a run can then still be gone on from.

Of rounds later than the one that was saved as many are kept again: a run that has lost its checkpoints begins
anew, and must find what it saves itself; a request that comes very late must not take the newest ones away.
"""
DAYS_KEPT = 30.0
"""Of a run that a real site hears no more of; one that goes on later starts with nothing remembered."""

HASH = "sha256"


@dataclass
class ClientStateStore:
    """States by run and client; without a folder they end with the process.

    The folder of a simulation's own directory is `of_one_run`: what the run is called doesn't matter
    then, as when the directory was moved. A round of many clients doesn't wait for the disk there, so
    that its memory survives a kill at any instant, but perhaps no power cut.
    """

    folder: Path | None = None
    of_one_run: bool = False
    _held: dict[tuple[str, str], dict[int, Tensors]] = field(default_factory=dict)

    def load_before(self, run: str, client: str, round: int) -> Tensors:
        """The client's newest state of a round before this one; empty where there is none.

        Raises:
            DataError: the state on the disk is damaged.
        """
        rounds = [r for r in self._rounds(run, client) if r < round]
        if not rounds:
            return {}
        if self.folder is None:
            return self._held[run, client][max(rounds)]
        return _read(self._path(run, client, max(rounds)))

    def save(self, run: str, round: int, states: Mapping[str, Tensors]) -> None:
        """Put the clients' states after a round in place of what they were, and let go of old ones.

        Raises:
            JobError: the disk is full, or the folder can't be written.
        """
        if self.folder is None:
            for client, state in states.items():
                self._held.setdefault((run, client), {})[round] = state
        else:
            self._write(run, round, states)
        for client in states:
            rounds = sorted(self._rounds(run, client))
            until, later = [r for r in rounds if r <= round], [r for r in rounds if r > round]
            for old in until[:-ROUNDS_KEPT] + later[:-ROUNDS_KEPT]:
                self._forget(run, client, old)

    def _write(self, run: str, round: int, states: Mapping[str, Tensors]) -> None:
        files = {self._path(run, client, round): encoded(state) for client, state in states.items()}
        try:
            for path in files:
                if not path.parent.is_dir():
                    self._make(path.parent)
            replace_all(files, mode=0o600, durable=not self.of_one_run)
        except OSError as error:
            raise JobError(f"{self.folder}: memory not written ({error.strerror})") from None

    def _make(self, folder: Path) -> None:
        """A folder for a client's new run; those of runs long past go."""
        assert self.folder is not None
        for part in (self.folder, folder.parent, folder):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        oldest = time.time() - DAYS_KEPT * 86400
        for other in folder.parent.iterdir() if not self.of_one_run else ():
            if other.stat().st_mtime < oldest:
                logger.info("memory of a run is %d days old and goes: %s", DAYS_KEPT, other)
                shutil.rmtree(other)

    def _rounds(self, run: str, client: str) -> Sequence[int]:
        if self.folder is None:
            return list(self._held.get((run, client), ()))
        found = self._path(run, client, 0).parent.glob("round-*.safetensors")
        return [int(path.stem.removeprefix("round-")) for path in found]

    def _forget(self, run: str, client: str, round: int) -> None:
        if self.folder is None:
            del self._held[run, client][round]
        else:
            remove(self._path(run, client, round))

    def _path(self, run: str, client: str, round: int) -> Path:
        """Where a state is; what the server calls the run is hashed, for it may be anything."""
        assert self.folder is not None
        name = "run" if self.of_one_run else hashlib.sha256(run.encode()).hexdigest()[:32]
        return self.folder / client / name / f"round-{round:06d}.safetensors"


def encoded(state: Tensors) -> bytes:
    """A state as safetensors bytes, with their hash."""
    return to_bytes(state, {HASH: tensors_sha256(state)})


def _read(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get(HASH)
            state: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: is damaged ({error}); the run can't go on from it") from None
    if known != tensors_sha256(state):
        raise DataError(f"{path}: is damaged (its SHA-256 is another); the run can't go on from it")
    return state
