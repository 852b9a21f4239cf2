"""What strangers can take up of the server's public port, over real TLS, by a clock that is turned."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from atoll.kit.kit import ServerKit
from atoll.server.deploy import reverse_proxy
from atoll.server.deploy.connection_limits import (
    AN_ADDRESS,
    HEAD_SECONDS,
    IDLE_SECONDS,
    SAY_AGAIN_SECONDS,
    ConnectionLimits,
    descriptors,
)
from atoll.server.deploy.reverse_proxy import BODY_LIMIT, HEAD_LIMIT, ReverseProxy, listen
from tests.federation.places import provisioned, unused_port
from tests.support.clock import TurnedClock
from tests.support.processes import WATCHDOG_SECONDS, wait_until

REQUEST = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@dataclass
class Door:
    """A server's public port, with a SuperLink behind it that isn't there."""

    kit: ServerKit
    limits: ConnectionLimits
    clock: TurnedClock
    lines: list[str]
    opened: list[socket.socket] = field(default_factory=list)

    def tcp(self) -> socket.socket:
        """A connection that says nothing yet."""
        connected = socket.create_connection(
            (self.kit.address.host, self.kit.address.port), timeout=WATCHDOG_SECONDS
        )
        self.opened.append(connected)
        return connected

    def tls(self) -> ssl.SSLSocket:
        """One that has shaken hands."""
        context = ssl.create_default_context(cafile=str(self.kit.authority))
        connected = context.wrap_socket(self.tcp(), server_hostname="127.0.0.1")
        self.opened.append(connected)
        return connected

    def holds(self, number: int) -> None:
        """Wait until so many connections are open."""
        wait_until(lambda: len(self.limits.open) == number, f"{number} connections, not {self.limits.open}")


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    kit = ServerKit.load(provisioned(tmp_path, ("north",), unused_port())["server"])
    clock, lines = TurnedClock(), list[str]()
    limits = ConnectionLimits(lines.append, clock.monotonic, most=16, an_address=6)
    gate = ReverseProxy(kit, listen(kit.address), f"127.0.0.1:{unused_port()}", limits)
    gate.start()
    made = Door(kit, limits, clock, lines)
    yield made
    for connected in made.opened:
        connected.close()
    gate.stop()


def ends(connected: socket.socket) -> bytes:
    """All that comes until the other side is done."""
    got = b""
    with contextlib.suppress(OSError):
        while part := connected.recv(4096):
            got += part
    return got


def answer(connected: socket.socket) -> bytes:
    """One answer, whose connection stays."""
    got = b""
    while b"starting again\n" not in got:
        part = connected.recv(4096)
        assert part, got
        got += part
    return got


def test_who_says_nothing_or_trickles_is_hung_up_on_after_ten_seconds(door: Door) -> None:
    silent, half, trickling, plain = door.tcp(), door.tls(), door.tls(), door.tcp()
    half.sendall(REQUEST[:20])
    plain.sendall(b"\x16\x03\x01")  # the beginning of a handshake
    door.holds(4)
    door.clock.now += HEAD_SECONDS - 1
    trickling.sendall(REQUEST[:10])
    time.sleep(0.6)  # one look at least, at which nothing is due
    assert len(door.limits.open) == 4
    trickling.sendall(REQUEST[10:12])
    door.clock.now += 1
    for connected in (silent, half, trickling, plain):
        ends(connected)
    door.holds(0)


def test_a_request_has_the_time_that_its_body_takes_and_the_next_one_half_a_minute(door: Door) -> None:
    connected = door.tls()
    connected.sendall(REQUEST)
    wait_until(lambda: [one.until for one in door.limits.open.values()] == [None], "a head")
    door.clock.now += 10 * HEAD_SECONDS
    connected.sendall(b"{}")
    assert answer(connected).startswith(b"HTTP/1.1 503")  # the SuperLink isn't there
    door.clock.now += IDLE_SECONDS - 1
    connected.sendall(REQUEST + b"{}")
    assert answer(connected).startswith(b"HTTP/1.1 503")
    wait_until(lambda: [one.until for one in door.limits.open.values()] != [None], "an end")
    door.clock.now += IDLE_SECONDS
    assert ends(connected) == b""
    door.holds(0)


def test_an_address_holds_so_many_connections_and_that_is_told_once_a_minute(door: Door) -> None:
    for _ in range(6):
        door.tls()
    door.holds(6)
    assert ends(door.tcp()) == b"" and ends(door.tcp()) == b""
    line = "127.0.0.1 holds 6 connections: no more is let in from there"
    assert door.lines == [line]
    door.clock.now += SAY_AGAIN_SECONDS
    wait_until(lambda: not door.limits.open, "the end of all, which said nothing")
    late = door.tls()
    late.sendall(REQUEST + b"{}")
    assert answer(late)  # there is room again


def test_where_a_site_was_heard_more_is_let_in_and_strangers_leave_half_to_sites() -> None:
    lines = list[str]()
    limits = ConnectionLimits(lines.append, lambda: 0.0, most=20, an_address=4)
    limits.held.update({"1.1.1.1": 4, "2.2.2.2": 4, "3.3.3.3": 1})
    assert not limits.admits("1.1.1.1") and limits.admits("3.3.3.3")
    limits.held["4.4.4.4"] += 1
    assert not limits.admits("5.5.5.5") and "addresses of no known site hold 10 connections" in lines[-1]
    limits.answered(("1.1.1.1", 9), by_a_site=True)
    assert limits.admits("1.1.1.1")
    limits.answered(("6.6.6.6", 9), by_a_site=False)
    assert "6.6.6.6" not in limits.known
    assert limits.admits("5.5.5.5")  # four of the ten are a site's now


def test_a_body_beyond_the_limit_is_not_kept(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BODY_LIMIT == 32 * 2**20
    monkeypatch.setattr(reverse_proxy, "BODY_LIMIT", 1000)
    for length, answered in ((1000, b"HTTP/1.1 503"), (1001, b"HTTP/1.1 413")):
        connected = door.tls()
        connected.sendall(REQUEST.replace(b"Length: 2", b"Length: %d" % length) + b"x" * length)
        assert connected.recv(12) == answered


def test_a_head_of_any_length_is_not_read_to_its_end(door: Door) -> None:
    connected = door.tls()
    with contextlib.suppress(OSError):
        connected.sendall(REQUEST[:-2] + b"x: " + b"y" * (4 * HEAD_LIMIT))
    assert b"503" not in ends(connected)
    door.holds(0)


def test_as_many_descriptors_are_taken_as_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        found = descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert found == 2**20 if hard == resource.RLIM_INFINITY else found == min(hard, 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_with_few_descriptors_still_takes_several_connections() -> None:
    assert ConnectionLimits(most=256 - 64).admits("1.1.1.1") and AN_ADDRESS <= (256 - 64) // 2
