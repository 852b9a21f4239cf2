"""A federation's status, asked from the server that runs on a kit; imports neither Flower nor torch.

The server answers on a Unix socket in the kit's state folder that only its owner may open: a client that
connects gets the present status as JSON, and the end of the stream.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import ConfigError, JobError
from atoll.kit.kit import ServerKit
from atoll.system.lock import is_held

logger = logging.getLogger(__name__)

NAME = "status.sock"
ANSWER_SECONDS = 90.0
"""How long a client waits for an answer; the server itself waits up to 30 s for each of two calls."""
READ_SECONDS = 10.0
"""How long a client may take to read the answer; others wait meanwhile."""


@dataclass(frozen=True)
class Run:
    """A run's status; `outcome` is empty until the run is finished.

    A run that `died` failed without raising an error: its process was killed, or the machine stopped.
    """

    run_id: int
    status: str
    outcome: str
    details: str
    submitted: str
    died: bool = False

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def completed(self) -> bool:
        return self.finished and self.outcome == "completed"


@dataclass(frozen=True)
class Federation:
    """A federation's status: its sites, its latest runs (newest first), and its health.

    `trouble` is the reason why it can't accept a job, empty while it can. While the SuperLink doesn't answer,
    `known` is false, and sites and runs are empty.
    """

    online: tuple[str, ...]
    offline: tuple[str, ...]
    runs: tuple[Run, ...]
    going_on: frozenset[int]
    trouble: str
    health: str
    """The address on which gRPC health probes are answered."""
    known: bool = True
    silent: dict[str, float] = field(default_factory=dict)
    """Sites that are online but silent, with the seconds since their last call."""

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"going_on": sorted(self.going_on)})

    @classmethod
    def from_json(cls, text: str) -> Federation:
        table: dict[str, Any] = json.loads(text)
        return cls(
            online=tuple(table.pop("online")),
            offline=tuple(table.pop("offline")),
            runs=tuple(Run(**run) for run in table.pop("runs")),
            going_on=frozenset(table.pop("going_on")),
            **table,
        )


def status(kit: Path) -> Federation:
    """The federation's present status, asked from the server that runs on the kit.

    Raises:
        ConfigError: no server runs on the kit.
        JobError: the server is starting or ending, or does not answer.
    """
    loaded = ServerKit.load(kit)
    try:
        with socket.socket(socket.AF_UNIX) as asking, short_path(loaded.state) as path:
            asking.settimeout(ANSWER_SECONDS)
            asking.connect(f"{path}/{NAME}")
            text = b"".join(iter(lambda: asking.recv(65536), b"")).decode("utf-8")
    except (FileNotFoundError, ConnectionRefusedError):
        if is_held(lock_path(loaded)):
            raise JobError(f"{kit}: the server on this kit is starting; ask again in a while") from None
        raise no_server(kit) from None
    except PermissionError:
        raise ConfigError(f"{kit}: the server that runs on this kit is another user's") from None
    except (TimeoutError, ConnectionError):
        raise JobError(f"{kit}: the server that runs on this kit does not answer") from None
    try:
        return Federation.from_json(text)
    except (ValueError, KeyError, TypeError):
        raise JobError(f"{kit}: the server that runs on this kit is ending, or of another version") from None


def lock_path(kit: ServerKit) -> Path:
    """The path of the file that a server holds locked from its start to its end."""
    return kit.state / "serve.lock"


def no_server(kit: Path) -> ConfigError:
    """The error to raise if no server runs on the kit."""
    return ConfigError(
        f"{kit}: no server runs on this kit; start one with: atoll serve {shlex.quote(str(kit))}"
    )


@contextmanager
def answering(folder: Path, answer: Callable[[], Federation]) -> Iterator[None]:
    """Within, a thread sends `answer()` to each client that connects to the socket in `folder`, in turn."""
    with socket.socket(socket.AF_UNIX) as listener, short_path(folder) as path:
        (folder / NAME).unlink(missing_ok=True)  # of a server that was killed
        listener.bind(f"{path}/{NAME}")
        (folder / NAME).chmod(0o600)
        listener.listen()  # nobody can connect before
        thread = threading.Thread(target=_answer_all, args=(listener, answer), name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            (folder / NAME).unlink(missing_ok=True)
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=READ_SECONDS)


def _answer_all(listener: socket.socket, answer: Callable[[], Federation]) -> None:
    """Answer until the listener is shut down."""
    while True:
        try:
            asking, _ = listener.accept()
        except OSError:
            return
        with asking:
            asking.settimeout(READ_SECONDS)
            try:
                asking.sendall(answer().to_json().encode("utf-8"))
            except Exception as error:  # noqa: BLE001 - the next client must still get an answer
                logger.warning("the status could not be told: %s: %s", type(error).__name__, error)


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """Within, a short path to the folder: a Unix socket's path may have only about 100 characters.

    Without /proc it is the folder's own path.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = f"/proc/self/fd/{handle}"
        yield link if os.path.isdir(link) else str(folder)  # noqa: PTH112 - not a path to resolve
    finally:
        os.close(handle)
