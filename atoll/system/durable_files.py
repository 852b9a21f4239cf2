"""Files that a kill at any instant leaves whole: temporary name, sync, rename, sync.

Whatever a run or a site keeps goes through this module's `os`, so that a disk that fails can stand in for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

Content = bytes | Iterable[bytes | memoryview]
"""What is written into a file: all of it, or one part after the other."""


def write_synced(path: Path, content: Content, mode: int = 0o666, *, durable: bool = True) -> None:
    """Write a file and wait until it is on the disk; `mode` is a new file's, less the umask.

    What is not `durable` is not waited for: a kill leaves it whole, a power cut may not.
    """
    _write(path, content, os.O_TRUNC, mode, durable=durable)


def append_synced(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Add to the end of a file, which is made if there is none, and wait until that is on the disk.

    An error may leave a part of the content there. Whether a new file's name lasts, `sync_folder` says.
    """
    _write(path, content, os.O_APPEND, 0o666, durable=durable)


def sync_file(path: Path) -> None:
    """Wait until a file's content and its name are on the disk; one that isn't there is no error."""
    with suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as handle:
        os.fsync(handle)
    sync_folder(path.parent)


def cut_synced(path: Path, length: int) -> None:
    """Take off what stands in a file behind its first `length` bytes, and wait until it is gone."""
    with _opened(path, os.O_WRONLY) as handle:
        os.ftruncate(handle, length)
        os.fsync(handle)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def _write(path: Path, content: Content, how: int, mode: int, *, durable: bool) -> None:
    with _opened(path, os.O_WRONLY | os.O_CREAT | how, mode) as handle:
        for part in [content] if isinstance(content, bytes) else content:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(handle, rest) :]
        if durable:
            os.fsync(handle)


@contextmanager
def _opened(path: Path, flags: int, mode: int = 0o666) -> Iterator[int]:
    """The file's handle for the time of the block; an error in it names the file."""
    handle = os.open(path, flags, mode)
    try:
        yield handle
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it takes its place; a lock keeps other writers away."""
    return path.with_name(f".{path.name}.partial")


def is_begun(folder: Path, first: str) -> bool:
    """Whether a folder holds more than a kill leaves as the `first` file is written: a lock, half of it."""
    left = {".lock", temporary_of(folder / first).name}
    return any(entry.name not in left for entry in folder.iterdir())


def replace_synced(path: Path, content: Content, mode: int = 0o666) -> None:
    """Put a file in place whole or not at all."""
    replace_all({path: content}, mode)


def replace_all(contents: Mapping[Path, Content], mode: int = 0o666, *, durable: bool = True) -> None:
    """Put files in place, each of them whole or not at all; an error leaves no temporary file."""
    temporary = {path: temporary_of(path) for path in contents}
    try:
        for path, content in contents.items():
            write_synced(temporary[path], content, mode, durable=durable)
        for path in contents:
            os.replace(temporary[path], path)
    except OSError:
        for left in temporary.values():
            remove(left)
        raise
    for folder in dict.fromkeys(path.parent for path in contents if durable):
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    with _opened(folder, os.O_RDONLY) as handle:
        os.fsync(handle)
