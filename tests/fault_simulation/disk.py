"""A disk that fails: what `atoll.system.durable_files` calls `os`, over real files in memory.

A power cut loses what was not synced: of a file's content everything behind a random place, of a folder the
names that were made or replaced since it was synced. A new folder itself is taken to last, as journalled file
systems have it once something in it was synced.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault_simulation.faults import RENAME, SYNC, WRITE, Fault

Meet = Callable[[str], list[Fault]]
"""The faults that happen at the next point of this kind on this disk."""
Draw = Callable[[], float]

BEFORE, HALFWAY = 1 / 3, 2 / 3
"""Amounts below which a fault comes before the act, or in the middle of it; else after it."""


class Died(BaseException):
    """The process is gone; a BaseException, so that nothing in between takes it for its own."""


@dataclass
class Disk:
    """One machine's disk. After a death it takes nothing more until `restart`, whatever unwinds."""

    meet: Meet
    is_dead: bool = False
    lost_power: bool = False
    files: dict[int, str] = field(default_factory=dict)
    unsynced: dict[str, bytes] = field(default_factory=dict)
    """Files whose content isn't on the disk, with the content that is."""
    unnamed: dict[str, bytes | None] = field(default_factory=dict)
    """Names that aren't on the disk, with the content that is there under them; None for nothing."""

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:
        self._alive()
        name = os.fspath(path)
        writes = flags & os.O_WRONLY
        if writes and name not in self.unsynced:
            before = _content(name)
            if before is None:
                self.unnamed.setdefault(name, None)
            self.unsynced[name] = before or b""
        handle = os.open(path, flags, mode)
        self.files[handle] = name
        return handle

    def close(self, handle: int) -> None:
        self.files.pop(handle, None)
        os.close(handle)

    def write(self, handle: int, content: memoryview) -> int:
        self._alive()
        for fault in self.meet(WRITE):
            if fault.kind.startswith(("killed", "power")):
                if fault.amount >= BEFORE:
                    os.write(handle, content if fault.amount >= HALFWAY else content[: len(content) // 2])
                self.die(power=fault.kind.startswith("power"))
            if fault.kind == "disk full":
                os.write(handle, content[: int(fault.amount * len(content))])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.write(handle, content)

    def ftruncate(self, handle: int, length: int) -> None:
        self._alive()
        os.ftruncate(handle, length)

    def fsync(self, handle: int) -> None:
        self._alive()
        faults = self.meet(SYNC)
        for fault in faults:
            if fault.kind == "sync fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if fault.amount < HALFWAY:
                self.die(power=fault.kind.startswith("power"))
        self._synced(handle)
        for fault in faults:
            self.die(power=fault.kind.startswith("power"))

    def _synced(self, handle: int) -> None:
        name = self.files[handle]
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            for path in [p for p in self.unnamed if os.path.dirname(p) == name]:  # noqa: PTH120
                del self.unnamed[path]
        else:
            self.unsynced.pop(name, None)

    def replace(self, source: str | Path, target: str | Path) -> None:
        self._alive()
        faults = self.meet(RENAME)
        for fault in faults:
            if fault.kind == "rename fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if fault.amount < 0.5:
                self.die(power=fault.kind.startswith("power"))
        old, new = os.fspath(source), os.fspath(target)
        before = _content(new)
        os.replace(source, target)  # noqa: PTH105 - the system call itself
        self.unnamed.setdefault(new, before)
        self.unnamed.pop(old, None)
        self.unsynced.pop(new, None)
        if old in self.unsynced:
            self.unsynced[new] = self.unsynced.pop(old)
        for fault in faults:
            self.die(power=fault.kind.startswith("power"))

    def unlink(self, path: str | Path) -> None:
        self._alive()
        os.unlink(path)  # noqa: PTH108 - the system call itself
        self.unsynced.pop(os.fspath(path), None)
        self.unnamed.pop(os.fspath(path), None)

    def die(self, *, power: bool) -> None:
        """End the process that writes here, and with `power` the machine.

        Raises:
            Died: always.
        """
        self.is_dead, self.lost_power = True, self.lost_power or power
        raise Died

    def restart(self, draw: Draw) -> None:
        """What the next process finds."""
        if self.lost_power:
            self._lose(draw)
            self.unsynced.clear()
            self.unnamed.clear()
        self.is_dead = self.lost_power = False

    def _lose(self, draw: Draw) -> None:
        for name, before in sorted(self.unnamed.items()):
            if draw() < 0.5:
                self.unsynced.pop(name, None)
                _put(name, before)
        for name, synced in sorted(self.unsynced.items()):
            content = _content(name)
            if content is not None and draw() < 0.8:
                start = len(synced) if content.startswith(synced) else 0
                _put(name, content[: start + int(draw() * (len(content) - start + 1))])

    def _alive(self) -> None:
        if self.is_dead:
            raise Died


def _content(name: str) -> bytes | None:
    try:
        return Path(name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _put(name: str, content: bytes | None) -> None:
    if content is None:
        Path(name).unlink(missing_ok=True)
    elif Path(name).parent.is_dir():
        Path(name).write_bytes(content)
