"""A server's certificate that is renewed while it serves: a connection is shown the one in the kit by then.

TLS lets a server choose its certificate for every handshake (the callback for server names, which OpenSSL
calls for a client that names none too). So nothing is stopped, and what is connected stays.
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
"""Makes a context of the files as they are."""


def following(
    build: Build, files: Sequence[Path], tell: Callable[[str], None] = logger.info
) -> ssl.SSLContext:
    """A server's context whose handshakes take what `build` makes of the files, anew when one has changed.

    Files that can't be used, as while only one of a pair has been written, change nothing and are told once.

    Raises:
        ssl.SSLError, OSError: they can't be used from the beginning.
    """
    return _Followed(build, files, tell).first


class _Followed:
    """The context of now, and what its files were like when it was made."""

    def __init__(self, build: Build, files: Sequence[Path], tell: Callable[[str], None]) -> None:
        self._build, self._files, self._tell = build, files, tell
        self._seen = _state_of(files)
        self.first = self._now = build()
        self.first.sni_callback = self._choose

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        """Called in every handshake, in the thread that shakes hands."""
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
    """What changes whenever a file does; nothing of one that isn't there just now."""
    return tuple(_stat(file) for file in files)


def _stat(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ino, status.st_size


def follow_certificates() -> None:
    """Let every server that uvicorn starts in this process follow its certificate and key."""
    from uvicorn import config

    made = config.create_ssl_context

    def create(*, certfile: Path | str, keyfile: Path | str, **others: Any) -> ssl.SSLContext:
        build = partial(made, certfile=certfile, keyfile=keyfile, **others)
        return following(build, (Path(certfile), Path(keyfile)))

    vars(config)["create_ssl_context"] = create
