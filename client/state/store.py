"""Stores what clients keep for a run: a method's state, such as compression errors, and the data's hash.

A client's state is a flat dict of tensors, stored with its round. A round reads the newest state of earlier
rounds, whatever was stored since, so that repeated requests, repeated rounds and resumed runs read the same
state as the first time. With a folder, a state is on disk before the update is sent, in files that only their
owner can read.
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
from atoll.protocol.tensors import Tensors, aligned, all_aligned, tensors_sha256, to_bytes
from atoll.system.durable_files import remove, replace_all, replace_synced

logger = logging.getLogger(__name__)

ROUNDS_KEPT = 3
"""How many states of a client are kept, so that a run can be resumed from its last two checkpoints.

As many states of later rounds than the saved one are kept too: a run that lost its checkpoints starts again
and must read what it saves itself, and a request that comes very late must not delete the newest states.
"""
DAYS_KEPT = 30.0
"""Days after which a real site deletes a silent run's states; resumed later, it starts without states."""

HASH = "sha256"
DATA_FILE = "data.sha256"


@dataclass
class ClientStateStore:
    """States by run and client; without a folder they are lost when the process ends.

    A folder inside a simulation's run directory is `of_one_run`: the run's name is then ignored, since the
    directory may be moved. A round of many clients does not wait for the disk there, so its states survive
    a kill at any instant, but perhaps not a power cut.
    """

    folder: Path | None = None
    of_one_run: bool = False
    _held: dict[tuple[str, str], dict[int, Tensors]] = field(default_factory=dict)
    _data: dict[tuple[str, str], str] = field(default_factory=dict)

    def load_before(self, run: str, client: str, round: int) -> Tensors:
        """The client's newest state of a round before `round`; empty where there is none.

        Raises:
            DataError: the state on disk is damaged.
        """
        rounds = [r for r in self._rounds(run, client) if r < round]
        if not rounds:
            return {}
        if self.folder is None:
            return all_aligned(self._held[run, client][max(rounds)])
        return _read(self._path(run, client, max(rounds)))

    def save(self, run: str, round: int, states: Mapping[str, Tensors]) -> None:
        """Store the clients' states after a round, replacing those of the same round, and delete old ones.

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

    def data_of(self, run: str, client: str, now: str) -> str:
        """The hash of the client's data when it first worked for the run: `now`, if that is now.

        It is on disk before the client works, so that a restarted site still has it. Without a folder, and in
        simulations, where data can't change, nothing is stored.

        Raises:
            DataError: the hash can't be written or read.
        """
        if self.folder is None or self.of_one_run:
            return now
        if (run, client) not in self._data:
            path = self._path(run, client, 0).with_name(DATA_FILE)
            try:
                if not path.exists():
                    self._make(path.parent)
                    replace_synced(path, now.encode(), mode=0o600)
                self._data[run, client] = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: can't be kept or read: {error}") from None
        return self._data[run, client]

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
        """Create the folder of a client's new run, and delete those of runs silent for `DAYS_KEPT`."""
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
        paths = self._path(run, client, 0).parent.glob("round-*.safetensors")
        return [int(path.stem.removeprefix("round-")) for path in paths]

    def _forget(self, run: str, client: str, round: int) -> None:
        if self.folder is None:
            del self._held[run, client][round]
        else:
            remove(self._path(run, client, round))

    def _path(self, run: str, client: str, round: int) -> Path:
        """The file of a state; the run's name is hashed, since the server may choose any text."""
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
            state: Tensors = {name: aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: is damaged ({error}); the run can't go on from it") from None
    if known != tensors_sha256(state):
        raise DataError(f"{path}: is damaged (its SHA-256 is another); the run can't go on from it")
    return state
