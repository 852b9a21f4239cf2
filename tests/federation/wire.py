"""What travels between sites and server, read in the clear: a tap with the server's own key."""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import load

from atoll.kit.kit import ServerKit
from atoll.protocol.tensors import Tensors
from tests.federation.lines import on_a_thread

WINDOW = 16
"""Bytes in a row that are searched for: four float32 or two int64 numbers."""
DULL = 8
"""A window with fewer different bytes than this may be anywhere."""


@dataclass
class Tap:
    """Ends the sites' TLS, writes down what they and the server say, and passes it on over TLS.

    `folder` has a file for each connection and direction; `up` is what sites say.
    """

    kit: ServerKit
    folder: Path
    port: int = 0
    count: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def into(self, folder: Path) -> None:
        """What comes from now on is written there."""
        folder.mkdir(parents=True)
        self.folder = folder

    async def listen(self) -> asyncio.Server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.kit.certificate, self.kit.key)
        server = await asyncio.start_server(self._meet, "127.0.0.1", self.port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _meet(self, near: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        self.count += 1
        name = f"{self.count:05d}"
        context = ssl.create_default_context(cafile=str(self.kit.authority))
        address = self.kit.address
        with suppress(OSError):
            far, asks = await asyncio.open_connection(address.host, address.port, ssl=context)
            await asyncio.gather(
                self._pass(near, asks, f"{name}.up"), self._pass(far, answers, f"{name}.down")
            )

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, name: str) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                with (self.folder / name).open("ab") as file:
                    file.write(data)
                sink.write(data)
                await sink.drain()
        sink.close()


@contextmanager
def tapped(kit: ServerKit, folder: Path) -> Iterator[Tap]:
    """A tap in front of a running server, for the time of the block."""
    tap = Tap(kit, folder)
    with on_a_thread(tap.listen()):
        yield tap


def traffic(folder: Path, way: str = "*") -> bytes:
    """All that was written down, one connection after the other; `way` is up or down, or both."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob(f"*.{way}")))


def share_found(plain: Iterable[bytes], stream: bytes) -> float:
    """Which part of all windows of the plain contents is in the stream, at any place."""
    windows = {
        window
        for content in plain
        for start in range(0, len(content) - WINDOW + 1, 8)
        if len(set(window := content[start : start + WINDOW])) >= DULL
    }
    assert windows, "there is nothing to search for"
    starts = np.sort(np.array([struct.unpack("<Q", window[:8])[0] for window in windows], dtype=np.uint64))
    found = set()
    for offset in range(8):
        words = np.frombuffer(stream, "<u8", count=(len(stream) - offset) // 8, offset=offset)
        near = np.minimum(np.searchsorted(starts, words), len(starts) - 1)
        for place in np.flatnonzero(starts[near] == words):
            at = offset + 8 * int(place)
            found.add(stream[at : at + WINDOW])
    return len(found & windows) / len(windows)


def bodies(stream: bytes, tensor: str) -> list[Tensors]:
    """The safetensors bodies in the stream that have this tensor, each once."""
    found: dict[bytes, Tensors] = {}
    mark, at = f'"{tensor}":{{"dtype"'.encode(), -1
    while (at := stream.find(mark, at + 1)) >= 0:
        body = _body_around(stream, at)
        found[body] = load(body)
    return list(found.values())


def _body_around(stream: bytes, at: int) -> bytes:
    """The whole body whose header is at this place: eight bytes of length, JSON, numbers."""
    start = at
    while True:
        start = stream.rindex(b"{", max(0, at - 4096), start)
        (length,) = struct.unpack("<Q", stream[start - 8 : start])
        if at - start < length < 1 << 16:
            header = json.loads(stream[start : start + length])
            size = max(entry["data_offsets"][1] for entry in header.values())
            return stream[start - 8 : start + length + size]
