"""A line between sites and their server whose faults a test chooses: late, narrow, held, cut, changed bytes.

It carries TCP as it comes, so TLS is between site and server alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from atoll.kit.kit import Address

CHUNK = 1 << 14
UP, DOWN = "up", "down"
"""The two ways: what a site says, and what the server does."""


@dataclass(frozen=True)
class Fault:
    """What a line does to bytes as long as it is faulty; `seconds` are for each chunk, `jitter` by turns.

    Bytes on a way that is `held` arrive once the line is whole again, as after lost packets. A connection is
    reset once so many bytes went up on it. A line that `flips` changes a bit of each chunk that goes up.
    """

    seconds: float = 0.0
    jitter: float = 0.0
    bytes_a_second: float | None = None
    held: tuple[str, ...] = ()
    reset_after: int | None = None
    flips: bool = False


WHOLE = Fault()


@dataclass
class Line:
    """What listens on `port` and passes on to the server; `happened` counts resets, flips and held chunks."""

    server: Address
    port: int = 0
    fault: Fault = WHOLE
    happened: int = 0
    chunks: int = 0

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._meet, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    @contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        """For the time of the block."""
        self.fault, self.happened = fault, 0
        try:
            yield
        finally:
            self.fault = WHOLE

    async def _meet(self, near: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far, asks = await asyncio.open_connection(self.server.host, self.server.port)
            await asyncio.gather(self._pass(near, asks, answers, UP), self._pass(far, answers, asks, DOWN))

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter, way: str
    ) -> None:
        passed = 0
        with suppress(OSError):
            while data := await source.read(CHUNK):
                self.chunks += 1
                data = await self._befallen(data, way)
                limit = self.fault.reset_after
                if way == UP and limit is not None and passed + len(data) > limit:
                    self.happened += 1
                    for end in (sink, back):
                        end.transport.abort()
                    return
                passed += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()

    async def _befallen(self, data: bytes, way: str) -> bytes:
        """What becomes of a chunk, once it arrives."""
        fault = self.fault
        await asyncio.sleep(fault.seconds + fault.jitter * (self.chunks % 3) / 2)
        if fault.bytes_a_second is not None:
            await asyncio.sleep(len(data) / fault.bytes_a_second)
        if way in fault.held:
            self.happened += 1
            while self.fault is fault:
                await asyncio.sleep(0.01)
        if way == UP and fault.flips:
            self.happened += 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


@contextmanager
def lined(server: Address) -> Iterator[Line]:
    """A line in front of a running server, for the time of the block."""
    line = Line(server)
    with on_a_thread(line.listen()):
        yield line


@contextmanager
def on_a_thread(listening: Coroutine[Any, Any, asyncio.Server]) -> Iterator[None]:
    """A server of asyncio that answers on a thread of its own, for the time of the block."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(listening)
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
