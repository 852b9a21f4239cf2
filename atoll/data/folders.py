"""What lies in a folder of data, in an order that no file system decides, and safe to open."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from atoll.data.diagnostics import Diagnostics, shown
from atoll.errors import DataError

_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def resolved(path: Path, root: Path) -> Path:
    """Where `path` leads, which must be inside `root` and exist; no link may lead out or in circles."""
    try:
        str(path).encode("utf-8")
        real = Path(os.path.realpath(path, strict=True))
    except UnicodeEncodeError:
        raise DataError(f"{shown(path)}: a name that is not UTF-8, expected one that is") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: {_why(error)}, expected a file") from None
    if not real.is_relative_to(os.path.realpath(root)):
        raise DataError(f"{shown(path)}: leads out of {shown(root)} to {shown(real)}, expected a file inside")
    return real


def checked_file(path: Path, root: Path) -> Path:
    """`path`, if it is a readable regular file inside `root`; a FIFO or device is never opened."""
    mode = resolved(path, root).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise DataError(f"{shown(path)}: {kind}, expected a regular file")
    return path


def listing(folder: Path, root: Path, diagnostics: Diagnostics) -> list[Path]:
    """What `folder` holds, by name, without hidden and system files, each of which is noted."""
    resolved(folder, root)
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be listed: {_why(error)}") from None
    return [entry for entry in entries if not _is_skipped(entry, diagnostics)]


def _is_skipped(entry: Path, diagnostics: Diagnostics) -> bool:
    hidden = entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES
    if hidden:
        diagnostics.warning("hidden or system file skipped", shown(entry))
    return hidden


def class_files(root: Path, base: Path, diagnostics: Diagnostics) -> Iterator[tuple[Path, str]]:
    """Each file of `base`/CLASS/ with its CLASS, ordered by path; what can't be one is refused."""
    for folder in listing(base, root, diagnostics):
        if folder.is_file():
            diagnostics.warning("file beside the class folders skipped", shown(folder))
            continue
        try:
            yield from _files_of_class(folder, root, diagnostics)
        except DataError as problem:
            diagnostics.error(problem)


def _files_of_class(folder: Path, root: Path, diagnostics: Diagnostics) -> Iterator[tuple[Path, str]]:
    if not resolved(folder, root).is_dir():
        checked_file(folder, root)
    files = listing(folder, root, diagnostics)
    if not files:
        diagnostics.warning("empty class folder", shown(folder))
    for path in files:
        try:
            yield checked_file(path, root), folder.name
        except DataError as problem:
            diagnostics.error(problem)


def _why(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", error)).lower()
