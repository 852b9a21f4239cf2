"""When each site was last heard: a dead one is named within seconds, long before Flower counts it as offline.

A site's SuperNode asks for work every second or oftener; while its clients train it sends a heartbeat every
three or four seconds. Flower counts it as offline only when these have been missing for a minute.
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
"""Of every call of a site; the SuperLink answers it only where the call is signed with that key."""
SILENT_SECONDS = 8.0
"""After so long without a call a site is called silent; a server looks every second."""


@lru_cache(maxsize=4096)
def key_of_header(text: str) -> bytes | None:
    """The public key that a call was signed with, as DER; None where it is none."""
    try:
        key = load_pem_public_key(b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_of_file(path: Path) -> bytes:
    """The public key in a kit's file, as DER."""
    key = load_ssh_public_key(path.read_bytes())
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@dataclass
class LastHeard:
    """When which key last signed a call that the SuperLink answered; for any thread."""

    clock: Callable[[], float] = time.monotonic
    _moments: dict[bytes, float] = field(default_factory=dict)
    _refused: set[tuple[bytes, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def heard(self, header: str | None) -> None:
        """A call with that header was answered as one of a site."""
        key = None if header is None else key_of_header(header)
        if key is not None:
            with self._lock:
                self._moments[key] = self.clock()

    def refused(self, header: str | None, address: str) -> None:
        """Who signs with that key asked from an address to connect, and was refused: it is connected."""
        key = None if header is None else key_of_header(header)
        if key is not None:
            with self._lock:
                self._refused.add((key, address))

    def take_refused(self) -> list[tuple[bytes, str]]:
        """(key, address) of those refused since this was asked for."""
        with self._lock:
            refused, self._refused = sorted(self._refused), set()
        return refused

    def silent(self, keys: Mapping[str, bytes], sites: Iterable[str]) -> dict[str, float]:
        """Those of the sites that were heard before and are silent now, with the seconds since."""
        with self._lock:
            moments = dict(self._moments)
        now, seconds = self.clock(), {}
        for site in sites:
            moment = moments.get(keys.get(site, b""))
            if moment is not None and now - moment >= SILENT_SECONDS:
                seconds[site] = now - moment
        return seconds
