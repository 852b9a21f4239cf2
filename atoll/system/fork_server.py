"""New processes from one warm parent: a fork server that has imported once what takes long to import.

`multiprocessing`'s fork server imports modules, starts no thread, touches no accelerator, and forks when a
process is wanted. The second process and every later one is there in milliseconds, and what it does with
threads or a GPU is its own. Whoever comes from a fork server has its own processes from the same one.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

from setproctitle import setproctitle

from atoll import plugins
from atoll.system import preload

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Settings that libraries read when they are imported: no reports home, no installing, no threads."""

STOP_SECONDS = 8.0
"""What a program has to end by itself, once its parent is gone."""

FORKABLE = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""For the fork server itself: pyarrow's allocator has a thread of its own unless it is told not to, and a
library that asks torch for a GPU while it is imported must not wake the driver, which outlives no fork."""

_lock = threading.Lock()
_modules: list[str] = [__name__]
"""What the fork server imports; this module first, for the next line."""
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
"""It warns of what torchao registers twice, in the middle of a site's own lines."""
_inherited = False
"""Whether this process comes from a fork server, which it then shares."""


def import_first(*modules: str) -> None:
    """Name modules that the fork server imports before it forks; those named after its start come too late.

    One that isn't installed is left out there, and missed by the process that needs it.
    """
    _modules.extend(module for module in modules if module not in _modules)


def fork_server() -> ForkServerContext:
    """The fork server's context; the server is started if it doesn't run, and imports in the background.

    Its processes don't get Ctrl-C: that is for whoever started them, who ends them.
    """
    context = multiprocessing.get_context("forkserver")
    if not _inherited:
        with _lock, _search_path(), _interrupts_blocked():
            context.set_forkserver_preload([preload.__name__])
            forkserver.ensure_running()
    return context


@contextmanager
def _search_path() -> Iterator[None]:
    """Within, a new Python finds the same modules as this one, and none in the folder it stands in."""
    changed = (
        QUIET
        | FORKABLE
        | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONSAFEPATH": "1",
            preload.MODULES: " ".join(_modules),
        }
    )
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    resource_tracker.ensure_running()  # it unblocks them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_pool(processes: int, initializer: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Worker processes, each started when there is work for it, and ended when this process ends.

    `initializer` is called with `arguments` in each; they have this process's environment as it is now, and
    are in its process group, and have loaded the same plugin files.
    """
    loaded = tuple(plugin.file for plugin in plugins.files())
    begin = (dict(os.environ), os.getpgid(0), loaded, initializer, arguments)
    return ProcessPoolExecutor(processes, fork_server(), _begin_worker, begin)


def _begin_worker(
    environment: Mapping[str, str],
    group: int,
    loaded: tuple[str, ...],
    initializer: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.setpgid(0, group)
    _enter(environment, "atoll worker")
    _when_parent_ends(_leave)
    plugins.load_files(loaded)
    initializer(*arguments)


def _enter(environment: Mapping[str, str], title: str) -> None:
    """In a new process: the environment and the title it is to have, and a share in the fork server."""
    global _inherited
    _inherited = True
    # Python means a child to use its parent's fork server, but `ensure_running` starts another one, since
    # the server is not the child's own process (seen in 3.11).
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]
    setproctitle(title)  # first, for it writes over the place where the old environment is
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


class _Stream:
    """An open file descriptor that travels to the new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.number),)


def _received(sent: Any) -> _Stream:
    return _Stream(sent.detach())


def start_program(
    entry: str,
    arguments: tuple[str, ...],
    *,
    environment: Mapping[str, str],
    output: int,
    errors: int,
    title: str,
    group: int = 0,
    dies_with_parent: bool = False,
) -> ForkServerProcess:
    """A process that calls `entry` (`module:function`) with `arguments` as the rest of sys.argv.

    It is in the process group `group`, or else in one of its own, and writes to the descriptors `output`
    and `errors`. When this process ends it gets SIGTERM, or, if it `dies_with_parent`, SIGKILL. Once this
    returns, its group is there, so that a signal to the group reaches it.
    """
    reader, writer = os.pipe()
    streams = (_Stream(output), _Stream(errors), _Stream(writer))
    after = _die if dies_with_parent else _stop
    process = fork_server().Process(
        target=_run_program, args=(entry, arguments, dict(environment), streams, title, group, after)
    )
    try:
        process.start()
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as begun:
        begun.read()  # its end is closed when the group is there, or the process gone
    return process


def _run_program(
    entry: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    streams: tuple[_Stream, _Stream, _Stream],
    title: str,
    group: int,
    after: Callable[[], None],
) -> None:
    os.setpgid(0, group)
    _enter(environment, title)
    output, errors, begun = (stream.number for stream in streams)
    os.dup2(output, 1), os.dup2(errors, 2)
    for number in {output, errors, begun}:
        os.close(number)
    # New ones, for what a stream has learnt of its file when it was opened is wrong now.
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _when_parent_ends(after)
    module, _, function = entry.partition(":")
    sys.argv = [function, *arguments]
    getattr(importlib.import_module(module), function)()


def _when_parent_ends(action: Callable[[], None]) -> None:
    """Call `action`, in a thread of its own, once the process that asked for this one is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        action()

    threading.Thread(target=wait, daemon=True).start()


def _leave() -> None:
    os._exit(1)


def _stop() -> None:
    """End as after SIGTERM, and with all that is in this process's group."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
