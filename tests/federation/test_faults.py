"""Sites and servers that die, leave, come late or change their data in the middle of a run."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.submit import status, stop
from tests.federation.conftest import CLIENTS, Ring, job
from tests.federation.places import result_of, rounds_of
from tests.processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]


def test_a_site_killed_at_work_and_at_its_upload_costs_no_bit(ring: Ring) -> None:  # row 4
    setting = job("killed", federation={"rounds": 3})
    federation, out = ring.whole(), ring.federation.folder / "killed"
    held = ring.hold("killed", 2)
    submitted = federation.submit(setting, out)
    ring.alone().says("round 2 of killed: train client-0000")
    ring.alone().kill()
    held.unlink()
    ring.alone().says("round 3 of killed: train client-0000: done")
    ring.alone().kill()
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)
    assert all(not line["set_aside"] for line in result_of(out)["rounds"])


def test_a_site_that_leaves_is_set_aside_by_name_and_the_rounds_close_without_it(ring: Ring) -> None:  # row 5
    """How long a round waits for a site that is gone is held to a turned clock in tests/test_carrier.py."""
    setting = job("leaving", federation={"rounds": 2, "round_timeout": 20})
    federation, out = ring.whole(), ring.federation.folder / "leaving"
    held = ring.hold("leaving", 1)
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of leaving: train client-0000")
    assert ring.alone().end() == 0
    held.unlink()
    assert submitted.ends() == 0, submitted.text()
    first, second = result_of(out)["rounds"]
    assert first["set_aside"] == {"client-0000": "the site is leaving"}
    assert second["set_aside"] == {"client-0000": "no reply before the deadline"}
    assert second["seconds"] >= 20
    assert set(result_of(out)["final"]["clients"]) == set(CLIENTS[1:])


def test_below_its_quorum_a_run_fails_in_one_line_and_keeps_the_last_round(ring: Ring) -> None:  # row 8
    setting = job("below", federation={"rounds": 3, "quorum": 1.0})
    federation, out = ring.whole(), ring.federation.folder / "below"
    held = ring.hold("below", 1, "client-0001")
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of below: train client-0000: done")
    with changed_data(ring):
        held.unlink()
        assert submitted.ends() == 1, submitted.text()
    assert "round 2: 2 of 3 usable updates, needed 3 (client-0000: its data changed" in submitted.text()
    assert submitted.text().count("error: ") == 1 and "Traceback" not in submitted.text()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["round-000001.safetensors"]
    run = status(federation.server).runs[0]
    assert run.outcome == "failed" and run.details.startswith("round 2: 2 of 3 usable updates")


def test_a_run_whose_server_app_was_killed_is_resumed_to_the_same_bits(ring: Ring) -> None:
    setting = job("resumed", federation={"rounds": 4})
    federation, out = ring.whole(), ring.federation.folder / "resumed"
    held = ring.hold("resumed", 3)
    submitted = federation.submit(setting, out)
    wait_until(lambda: len(rounds_of(out)) >= 2, "two rounds")
    os.kill(federation.pid_of("flwr-serverapp"), signal.SIGKILL)
    submitted.process.send_signal(signal.SIGINT)
    assert submitted.ends() == 130
    held.unlink()
    assert stop(federation.server, federation.latest()).outcome == "stopped"
    assert not (out / "result.json").exists()
    resumed = federation.submit(setting, out, "--resume")
    assert resumed.ends() == 0, resumed.text()
    assert "resumed after round" in resumed.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)


def test_a_late_site_at_a_restarted_server_ends_in_the_same_bits(ring: Ring) -> None:  # rows 37, 39
    federation, out = ring.whole(), ring.federation.folder / "late"
    assert ring.alone().end() == 0
    assert federation.running["server"].end() == 0
    federation.serve()
    federation.wait_online("pair")
    submitted = federation.submit(job(), out)
    submitted.says("2 of 3 clients are here: client-0001, client-0002")
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(job())


def test_data_that_changes_in_a_run_is_refused_until_the_next_run(ring: Ring) -> None:  # row 40
    setting = job("changed", federation={"rounds": 3})
    federation, out = ring.whole(), ring.federation.folder / "changed"
    held = [ring.hold("changed", round, "client-0001") for round in (1, 2)]
    submitted = federation.submit(setting, out)
    federation.running["pair"].says("round 1 of changed: train client-0001")
    ring.alone().says("round 1 of changed: train client-0000: done")
    next((ring.shards / "client-0000").rglob("*.png")).touch()  # a new time alone is no change
    held[0].unlink()
    federation.running["pair"].says("round 2 of changed: train client-0001")
    ring.alone().says("round 2 of changed: train client-0000: done")
    with changed_data(ring):
        held[1].unlink()
        assert submitted.ends() == 0, submitted.text()
        first, second, third = (line["set_aside"] for line in result_of(out)["rounds"])
        assert (first, second) == ({}, {})
        assert third == {"client-0000": "its data changed during the run; the site's log says more"}
        assert federation.run(job())["rounds"][0]["set_aside"] == {}


@contextmanager
def changed_data(ring: Ring) -> Iterator[None]:
    """Within, one of the lone site's images is another's."""
    image = next((ring.shards / "client-0000").rglob("*.png"))
    other = next((ring.shards / "client-0001").rglob("*.png"))
    before = image.read_bytes()
    shutil.copy(other, image)
    try:
        yield
    finally:
        image.write_bytes(before)
