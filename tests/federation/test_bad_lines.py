"""Real sites behind a line that is late, narrow, held, cut or noisy: runs wait, and end in the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from atoll.kit.kit import ServerKit
from tests.federation.conftest import CLIENTS, Ring, job
from tests.federation.lines import DOWN, UP, Fault, Line, lined
from tests.federation.places import result_of
from tests.support.processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.matrix, pytest.mark.timeout(900)]

LONG_SECONDS = 12.0
"""Longer than a site that trains is without a word, which makes it a silent one."""


@dataclass
class Bad:
    """A federation whose one-client site reaches the server through a line."""

    ring: Ring
    line: Line


@pytest.fixture(scope="module")
def bad(ring: Ring) -> Iterator[Bad]:
    address = ServerKit.load(ring.federation.server).address
    table = ring.federation.kits["client-0000"] / "kit.toml"
    with lined(address) as line:
        table.write_text(table.read_text().replace(f"port = {address.port}", f"port = {line.port}"))
        ring.whole()
        yield Bad(ring, line)
        ring.alone().end()


SLOW = {
    "500 ms late, with jitter": Fault(seconds=0.4, jitter=0.2),  # row 14
    "1 Mbit/s": Fault(bytes_a_second=125_000),  # row 15
}


@pytest.mark.parametrize("name", SLOW)
def test_a_line_that_is_late_or_narrow_costs_time_alone(bad: Bad, name: str) -> None:
    setting, ring = job(f"slow-{len(name)}"), bad.ring
    with bad.line.faulty(SLOW[name]):
        result = ring.federation.run(setting)
    assert result["model_sha256"] == ring.expected(setting)
    assert [line["set_aside"] for line in result["rounds"]] == [{}, {}]


FAULTS: dict[str, tuple[Fault, float]] = {
    "a partition of 2 s": (Fault(held=(UP, DOWN)), 2.0),  # row 10
    "a partition of 60 s": (Fault(held=(UP, DOWN)), 60.0),
    "nothing gets down": (Fault(held=(DOWN,)), 40.0),  # row 11
    "nothing gets up": (Fault(held=(UP,)), 40.0),
    "reset in uploads": (Fault(reset_after=3_000), 5.0),  # rows 12, 19
    "reset while it is opened": (Fault(reset_after=100), 5.0),
    "a flipped bit": (Fault(flips=True), 5.0),  # row 18
}
"""What befalls the line as a client's training ends, and for how long."""


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_befalls_a_sites_connections_the_run_ends_in_the_same_bits(bad: Bad, name: str) -> None:
    fault, seconds = FAULTS[name]
    ring, setting = bad.ring, job(f"line-{list(FAULTS).index(name)}")
    federation, out = ring.federation, ring.federation.folder / setting.name
    held = ring.hold(setting.name, 1)
    submitted = federation.submit(setting, out)
    ring.alone().says(f"held: {held.name}")
    with bad.line.faulty(fault):
        held.unlink()
        wait_until(lambda: bad.line.happened, f"{name} on the line")
        time.sleep(seconds)
    assert submitted.ends() == 0, submitted.text()
    result = result_of(out)
    assert result["model_sha256"] == ring.expected(setting)
    assert [line["set_aside"] for line in result["rounds"]] == [{}, {}]
    assert set(result["final"]["clients"]) == set(CLIENTS)


def test_a_site_that_trains_is_not_called_silent_and_one_behind_a_partition_is(bad: Bad) -> None:
    ring, setting = bad.ring, job("long")
    federation, server = ring.federation, ring.federation.running["server"]
    held = ring.hold(setting.name, 1)
    submitted = federation.submit(setting, federation.folder / setting.name)
    ring.alone().says(f"held: {held.name}")
    silent, heard = (f"client-0000 is {word}" for word in ("silent", "heard again"))
    before = {words: server.text().count(words) for words in (silent, heard)}
    time.sleep(LONG_SECONDS)
    assert server.text().count(silent) == before[silent]
    with bad.line.faulty(Fault(held=(UP, DOWN))):
        server.says(silent, times=before[silent] + 1)
    server.says(heard, times=before[heard] + 1)
    held.unlink()
    assert submitted.ends() == 0, submitted.text()
