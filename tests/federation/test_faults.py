"""Sites and servers that die, leave, come late or change their data in the middle of a run."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atoll.server.deploy.status import status
from atoll.system.audit_file import FILE, verify
from tests.federation.conftest import CLIENTS, Ring, job
from tests.federation.places import command_lines, result_of, rounds_of
from tests.support.processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]


def test_sites_and_servers_that_die_or_come_late_cost_no_bit(ring: Ring) -> None:  # rows 2, 3, 4, 37, 39
    """One run: a site dies at work and at its upload, then with the ServerApp, then the whole server ends.

    Nobody does anything about it but to start the server again, as systemd would. While the site is away the
    run's next process waits for it, so that the server's end finds it there.
    """
    setting = job("killed", federation={"rounds": 3})
    federation, out = ring.whole(), ring.federation.folder / "killed"
    held = [ring.hold("killed", round) for round in (1, 3)]
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of killed: train client-0000")
    ring.alone().kill()
    held[0].unlink()
    ring.alone().says("round 2 of killed: train client-0000: done")
    ring.alone().kill()
    ring.alone()
    wait_until(lambda: len(rounds_of(out)) >= 2, "two rounds")
    ring.alone().kill()
    os.kill(federation.pid_of("flwr-serverapp"), signal.SIGKILL)
    submitted.says("died; it goes on as run")
    assert status(federation.server).runs[1].details.startswith("goes on as run")

    waiting = "2 of 3 clients are here: client-0001, client-0002"
    submitted.says(waiting)
    assert federation.running["server"].end() == 0
    assert not (out / "result.json").exists()
    federation.serve().says("died; it goes on as run")
    federation.wait_online("pair")
    wait_until(lambda: submitted.text().count(waiting) == 2, "a third process that waits")
    held[1].unlink()
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    assert "resumed after round" in submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)
    assert [line["set_aside"] for line in result_of(out)["rounds"]] == [{}, {}, {}]


def test_a_site_that_leaves_is_set_aside_by_name_and_the_rounds_close_without_it(ring: Ring) -> None:  # row 5
    """How long a round waits for it is held to a turned clock in tests/server/rounds/test_carrier.py."""
    federation, out = ring.whole(), ring.federation.folder / "leaving"
    held = ring.hold("leaving", 1)
    cuts = [ring.cut("leaving", 2, kind, "client-0000") for kind in ("train", "evaluate")]
    submitted = federation.submit(job("leaving"), out)
    ring.alone().says("round 1 of leaving: train client-0000")
    assert ring.alone().end() == 0
    held.unlink()
    assert submitted.ends() == 0, submitted.text()
    first, second = result_of(out)["rounds"]
    assert first["set_aside"] == {"client-0000": "the site is leaving"}
    assert second["set_aside"] == {"client-0000": "no reply before the deadline"}
    assert not any(cut.exists() for cut in cuts)
    assert set(result_of(out)["final"]["clients"]) == set(CLIENTS[1:])

    logged = federation.server / "state" / FILE
    lines = [json.loads(line) for line in logged.read_text().splitlines()[1:]]
    told = [line for line in lines if line.get("job") == "leaving"]  # refused connections are of no job
    assert verify(logged).lines == len(lines)
    assert told[0]["decision"] == "accepted" and told[0]["uid"] == os.getuid()
    ended = [line["set_aside"] for line in told if (line["asked"], line["decision"]) == ("round", "ended")]
    assert ended == [first["set_aside"], second["set_aside"]]
    assert (told[-1]["decision"], told[-1]["model"]) == ("completed", result_of(out)["model_sha256"])


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("strategy", "cohort"),
    [
        ({"name": "fedbuff"}, 1),
        ({"name": "fedcompass", "options": {"min_steps": 2, "max_steps": 6}}, None),
    ],
    ids=["fedbuff", "fedcompass"],
)
def test_by_arrival_nobody_waits_for_a_site_that_is_slow(
    ring: Ring, strategy: dict[str, Any], cohort: int | None
) -> None:
    """The slow one is done only after the last round; its update came from the first model, unread."""
    name = f"arriving-{strategy['name']}"
    federation, out = ring.whole(), ring.federation.folder / name
    unmeasured = {"validation_fraction": 0}
    asynchronous = {"cohort": cohort, "concurrency": 3, "order": "arrival", "rounds": 4}
    setting = job(name, federation=asynchronous, strategy=strategy, data=unmeasured)
    held = ring.hold(name, 1)
    submitted = federation.submit(setting, out)
    wait_until(lambda: len(rounds_of(out)) == 4, "four rounds")
    held.unlink()
    assert submitted.ends() == 0, submitted.text()
    rounds = result_of(out)["rounds"]
    assert {name for line in rounds for name in line["cohort"]} == set(CLIENTS[1:])
    assert [line["set_aside"] for line in rounds] == [{}] * 4
    assert any(line["staleness"]["max"] for line in rounds)


@pytest.mark.matrix
def test_a_site_without_memory_is_killed_by_the_kernel_and_costs_no_bit(ring: Ring) -> None:  # row 25
    setting = job("starved")
    federation, out = ring.whole(), ring.federation.folder / "starved"
    held = ring.hold("starved", 1)
    submitted = federation.submit(setting, out)
    ring.alone().says(f"held: {held.name}")
    kit = str(federation.kits["client-0000"])
    [executor] = [pid for pid, line in command_lines() if line.startswith("atoll executor") and kit in line]
    with starved(executor) as kills:
        held.unlink()
        wait_until(lambda: kills() == 1, "a process that the kernel ends")
    assert submitted.ends() == 0, submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)
    assert [line["set_aside"] for line in result_of(out)["rounds"]] == [{}, {}]


@contextmanager
def starved(pid: int) -> Iterator[Callable[[], int]]:
    """Within, the process gets no page of memory more; yields how many were killed for want of it."""
    group = Path("/sys/fs/cgroup/memory") / f"atoll-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    try:
        control = group / "memory.oom_control"
        (group / "memory.limit_in_bytes").write_text("4096")
        (group / "cgroup.procs").write_text(str(pid))
        yield lambda: int(dict(map(str.split, control.read_text().splitlines()))["oom_kill"])
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "an end of what was in it")
        group.rmdir()


@pytest.mark.matrix
def test_a_site_that_stood_still_is_in_the_rounds_after_it(ring: Ring) -> None:  # row 6
    """Its processes are stopped for longer than a round may take, and then go on."""
    setting = job("still", federation={"rounds": 3, "round_timeout": 20, "quorum": 0.5})
    federation, out = ring.whole(), ring.federation.folder / "still"
    held = ring.hold("still", 1)
    submitted = federation.submit(setting, out)
    ring.alone().says(f"held: {held.name}")
    stopped = [pid for pid, line in command_lines() if str(federation.kits["client-0000"]) in line]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    held.unlink()
    wait_until(lambda: len(rounds_of(out)) >= 1, "a round without it")
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert submitted.ends() == 0, submitted.text()
    rounds = result_of(out)["rounds"]
    assert rounds[0]["set_aside"] == {"client-0000": "no reply before the deadline"}
    assert rounds[-1]["set_aside"] == {} and len(rounds) == 3


def test_data_that_changes_in_a_run_is_refused_until_the_next_run(ring: Ring) -> None:  # rows 8, 40
    """While one client's data changed, the run goes on; of two, it is below its quorum, and fails."""
    setting = job("changed", federation={"rounds": 3, "quorum": 0.6})
    federation, out = ring.whole(), ring.federation.folder / "changed"
    held = [ring.hold("changed", 1), ring.hold("changed", 2), ring.hold("changed", 3, "client-0001")]
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of changed: train client-0000")
    next((ring.shards / "client-0000").rglob("*.png")).touch()  # a new time alone is no change
    held[0].unlink()
    ring.alone().says("round 2 of changed: train client-0000")
    with changed_data(ring, "client-0000", "client-0001"):
        held[1].unlink()
        ring.pair().says("round 3 of changed: train client-0001")
        with changed_data(ring, "client-0001", "client-0002"):
            held[2].unlink()
            assert submitted.ends() == 1, submitted.text()
            first, second = (line["set_aside"] for line in rounds_of(out))
            assert first == {}
            assert second == {"client-0000": "its data changed during the run; the site's log says more"}
            assert federation.run(job("next", federation={"rounds": 1}))["rounds"][0]["set_aside"] == {}
    failure = "round 3: 1 of 3 usable updates, needed 2"
    assert f"{failure} (client-0000: its data changed" in submitted.text()
    assert "client-0001: its data changed" in submitted.text()
    assert submitted.text().count("error: ") == 1 and "Traceback" not in submitted.text()
    assert max(path.name for path in (out / "checkpoints").iterdir()) == "round-000002.safetensors"
    run = next(run for run in status(federation.server).runs if run.details.startswith(failure))
    assert run.outcome == "failed"


@contextmanager
def changed_data(ring: Ring, client: str, other: str) -> Iterator[None]:
    """Within, one of the client's images is another client's."""
    image = next((ring.shards / client).rglob("*.png"))
    before = image.read_bytes()
    shutil.copy(next((ring.shards / other).rglob("*.png")), image)
    try:
        yield
    finally:
        image.write_bytes(before)
