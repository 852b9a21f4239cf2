"""One process at a time on a folder, and files that tell whether a process lives."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from atoll.errors import ConfigError


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file while the block runs; a second holder is refused, naming the first's pid.

    The lock is the kernel's and ends with the process, however it ends.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = path.open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise ConfigError(f"{path.parent.parent}: {what} already runs on this kit, pid {pid}") from None
        _write_pid(file)
        yield


def hold(path: Path) -> TextIO:
    """Lock a file, with this process's pid in it, until the file is closed or the process ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = path.open("a+", encoding="ascii")
    fcntl.flock(file, fcntl.LOCK_EX)
    _write_pid(file)
    return file


def _write_pid(file: TextIO) -> None:
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def is_held(path: Path) -> bool | None:
    """Whether a process holds the file; None where there is no such file."""
    try:
        file = path.open(encoding="ascii")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def end_holder(path: Path) -> None:
    """Kill the process that holds the file, if one does."""
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):
        if is_held(path):
            os.kill(int(path.read_text("ascii")), signal.SIGKILL)
