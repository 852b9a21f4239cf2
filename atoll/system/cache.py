"""Where downloaded weights and decoded data are kept, and how many processes share them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from atoll.errors import InputError


def cache_root() -> Path:
    """`$ATOLL_CACHE`, or `~/.cache/atoll`; it need not exist yet."""
    chosen = os.environ.get("ATOLL_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "atoll"


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, made by `fill` at first use: whole or not there, whoever else makes it meanwhile.

    `fill` gets an empty folder beside it, renamed into place when it returns.
    """
    try:
        if not folder.is_dir():
            _make(folder, fill)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error}; expected a writable $ATOLL_CACHE") from None
    return folder


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The system lets go of the lock when its holder dies.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _publish(folder, fill)


def _publish(folder: Path, fill: Callable[[Path], None]) -> None:
    staging = folder.with_name(f".{folder.name}.part")
    # The lock is ours: what lies there is of a process that died.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        fill(staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
