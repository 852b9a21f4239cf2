"""Processes from the fork server: what they find imported, whose they are, and how they end."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atoll.privacy.noise import entropy
from atoll.privacy.secagg import Participant
from atoll.system.child_process import Child
from atoll.system.fork_server import worker_pool
from atoll.system.preload import MODULES
from tests.support.processes import atoll, python, wait_until

pytestmark = pytest.mark.processes

FOUND: dict[str, str] = {}


def note(name: str, value: str) -> None:
    """In a new worker process: keep what the initializer was given."""
    FOUND[name] = value


def look() -> dict[str, object]:
    """In a worker process: what it finds."""
    return {
        "torch": "torch" in sys.modules,
        "given": dict(FOUND),
        "environment": os.environ.get("ATOLL_TEST_COLOUR"),
        "group": os.getpgid(0),
        "server": os.getppid(),
        "interrupts": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()),
        "accelerator": torch.cuda.is_initialized(),
        "title": Path("/proc/self/cmdline").read_text().rstrip("\0 "),
        "garbage": (gc.isenabled(), gc.get_freeze_count() > 100_000),
        "preload": os.environ.get(MODULES),
    }


def look_twice() -> tuple[dict[str, object], dict[str, object]]:
    """In a worker process: what it finds, and what a worker of its own finds."""
    with worker_pool(1, note, "own", "yes") as pool:
        return look(), pool.submit(look).result()


def test_a_worker_has_its_parents_environment_and_group_and_no_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for colour in ("red", "blue"):  # the server was started once, the environment is that of now
        monkeypatch.setenv("ATOLL_TEST_COLOUR", colour)
        with worker_pool(1, note, "key", colour) as pool:
            found = pool.submit(look).result()
        assert found["torch"] and found["environment"] == colour and found["given"] == {"key": colour}
        assert found["group"] == os.getpgid(0) and found["interrupts"] and not found["accelerator"]
        assert found["title"] == "atoll worker"
        # What the server imported is no garbage, and looking at it would copy it.
        assert found["garbage"] == (True, True) and found["preload"] is None


def test_workers_of_a_worker_come_from_the_same_server() -> None:
    with worker_pool(1, note, "key", "value") as pool:
        first, second = pool.submit(look_twice).result()
    assert first["server"] == second["server"] != os.getpid()
    assert first["group"] == second["group"] and second["given"] == {"own": "yes"}


SERVER_THREADS = """
import multiprocessing, os
from atoll.system.fork_server import fork_server, import_first, worker_pool
from atoll.tasks.imports import ANY
import_first("atoll.sim.engines.process_pool", "atoll.server.app", "atoll.client.app", *ANY)
with worker_pool(1, int) as pool:
    server = pool.submit(os.getppid).result()
    names = [open(f"/proc/{server}/task/{n}/comm").read().strip() for n in os.listdir(f"/proc/{server}/task")]
    maps = open(f"/proc/{server}/maps").read()
print(len(names), "nvidia" in maps and "/dev/nvidia" in maps)
"""


def test_the_server_has_no_thread_and_no_accelerator_when_it_forks() -> None:
    """OpenBLAS, which starts threads when it is loaded, ends them around a fork; here it has none to end."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SERVER_THREADS], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_a_program_gets_its_arguments_writes_to_its_streams_and_has_an_exit_status() -> None:
    process = python("import sys; print(sys.argv[1:]); print('no', file=sys.stderr); sys.exit(3)", "a b", "c")
    assert process.communicate() == ("['a b', 'c']\n", "no\n")
    assert process.returncode == 3
    assert atoll("frobnicate").wait() == 2


PARENT = """
import os, signal, time
from atoll.system.child_process import Child
child = Child("sleeper", "tests.system.test_warm:sleep", ["{ending}"], os.environ, dies_with_parent={dies})
child.start()
print(child.pid, flush=True)
signal.pause()
"""


def sleep() -> None:
    """A program that says so when it is asked to stop."""

    def stop(*_: object) -> None:
        Path(sys.argv[1]).write_text("asked")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    Path(sys.argv[1]).with_name("ready").touch()
    signal.pause()


@pytest.mark.parametrize("dies", [False, True])
def test_a_program_ends_with_whoever_started_it_and_is_asked_first_unless_it_dies_with_it(
    dies: bool, tmp_path: Path
) -> None:
    ending = tmp_path / "ending"
    parent = python(PARENT.format(ending=ending, dies=dies))
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_until((tmp_path / "ready").exists, "program")
    parent.kill()
    wait_until(lambda: not _lives(child), "end of the child")
    assert ending.exists() is not dies


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def draw() -> tuple[list[int], bytes, float]:
    """In a worker process: noise's random bits, the public keys of a secure sum, Python's own number."""
    return entropy(4).tolist(), Participant("a", b"context").advertise(), random.random()


def test_forked_processes_draw_neither_the_same_noise_nor_the_same_keys() -> None:
    """They begin as copies of one process, so any generator that it had seeded would be the same in all."""
    drawn = []
    for _ in range(3):
        with worker_pool(1, int) as pool:
            drawn.append(pool.submit(draw).result())
    for one, other in itertools.combinations(drawn, 2):
        assert not set(one[0]) & set(other[0])
        assert one[1] != other[1] and one[2] != other[2]


def complain() -> None:
    """A program that logs what it does and fails."""
    sys.stdout.write("\x1b[92mINFO \x1b[0m:      ControlServicer.ListNodes\n")
    sys.stdout.write("2026-11-29T05:55:53.730Z INFO [uvicorn.access] POST /v1/control/list-nodes\n")
    sys.stdout.write("no space is left for the state\n")


def test_what_an_ended_program_complained_of_is_told_without_its_log() -> None:
    child = Child("program", "tests.system.test_warm:complain", [], dict(os.environ))
    child.start()
    wait_until(lambda: not child.running, "its end")
    assert child.last_complaints() == "no space is left for the state"
    assert "ListNodes" in child.last_lines()
