"""Renewing a server's certificate while it runs: new connections get the certificate that is now in the kit.

TLS lets a server choose its certificate in every handshake (by the callback for server names, which OpenSSL
calls also for clients that send no name). So no process is restarted, and existing connections stay open.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Build = Callable[[], ssl.SSLContext]
"""Builds a context from the present content of the files."""


def following(
    build: Build, files: Sequence[Path], tell: Callable[[str], None] = logger.info
) -> ssl.SSLContext:
    """A server's TLS context that calls `build` again, before a handshake, when one of `files` has changed.

    If the changed files are unusable, as while only one of a pair has been written, the previous certificate
    stays in use, and `tell` gets one line.

    Raises:
        ssl.SSLError, OSError: the files are unusable at the first call.
    """
    return _Followed(build, files, tell).first


class _Followed:
    """The present context, and the state of its files when it was built."""

    def __init__(self, build: Build, files: Sequence[Path], tell: Callable[[str], None]) -> None:
        self._build, self._files, self._tell = build, files, tell
        self._seen = _state_of(files)
        self.first = self._now = build()
        self.first.sni_callback = self._choose

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        """The callback for server names: called in every handshake, in the thread of that handshake."""
        if (state := _state_of(self._files)) != self._seen:
            self._seen = state
            self._renew()
        if self._now is not self.first:
            connection.context = self._now

    def _renew(self) -> None:
        try:
            self._now = self._build()
        except (ssl.SSLError, OSError) as error:
            self._tell(f"{self._files[0]} has changed and cannot be used, the one before stays: {error}")
        else:
            self._tell(f"{self._files[0]} is a new certificate, which sites are shown from now on")


def _state_of(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """Modification time, inode and size of each file; an empty tuple for a file that doesn't exist."""
    return tuple(_stat(file) for file in files)


def _stat(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ino, status.st_size


def follow_certificates() -> None:
    """Make every server that uvicorn starts in this process reload a changed certificate and key."""
    from uvicorn import config

    made = config.create_ssl_context

    def create(*, certfile: Path | str, keyfile: Path | str, **others: Any) -> ssl.SSLContext:
        build = partial(made, certfile=certfile, keyfile=keyfile, **others)
        return following(build, (Path(certfile), Path(keyfile)))

    vars(config)["create_ssl_context"] = create
