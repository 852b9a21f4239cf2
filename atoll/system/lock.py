"""One process at a time on a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
