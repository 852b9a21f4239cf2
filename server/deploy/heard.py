"""The time of each site's last call, so that a dead site is reported within seconds.

A site's SuperNode asks for work at least every second; while its clients train it sends a heartbeat every
three or four seconds. Flower counts a site as offline only after a minute without heartbeats.
"""

from __future__ import annotations

import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

KEY_HEADER = "flwr-public-key"
"""The header of a site's calls that holds its public key; the SuperLink answers only calls signed with it."""
SILENT_SECONDS = 8.0
"""The time without a call after which a site is reported as silent; the server checks every second."""


@lru_cache(maxsize=4096)
def key_of_header(text: str) -> bytes | None:
    """The public key in a call's header, as DER; None if the text is no public key."""
    try:
        key = load_pem_public_key(b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_of_file(path: Path) -> bytes:
    """The public key in an OpenSSH file of a kit, as DER."""
    key = load_ssh_public_key(path.read_bytes())
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@dataclass
class LastHeard:
    """The time of the last call that the SuperLink answered, for each public key; usable from any thread."""

    clock: Callable[[], float] = time.monotonic
    _moments: dict[bytes, float] = field(default_factory=dict)
    _refused: set[tuple[bytes, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def heard(self, header: str | None) -> None:
        """Record that the SuperLink has answered a call with this header."""
        key = None if header is None else key_of_header(header)
        if key is not None:
            with self._lock:
                self._moments[key] = self.clock()

    def refused(self, header: str | None, address: str) -> None:
        """Record that a connection with this header was refused because the site is connected already."""
        key = None if header is None else key_of_header(header)
        if key is not None:
            with self._lock:
                self._refused.add((key, address))

    def take_refused(self) -> list[tuple[bytes, str]]:
        """(public key, address) of each connection refused since the last call of this method."""
        with self._lock:
            refused, self._refused = sorted(self._refused), set()
        return refused

    def silent(self, keys: Mapping[str, bytes], sites: Iterable[str]) -> dict[str, float]:
        """Seconds since the last call, for each of `sites` that has called before and is silent now."""
        with self._lock:
            moments = dict(self._moments)
        now, seconds = self.clock(), {}
        for site in sites:
            moment = moments.get(keys.get(site, b""))
            if moment is not None and now - moment >= SILENT_SECONDS:
                seconds[site] = now - moment
        return seconds
