"""A command whose worker processes have so many pieces of work done and then wait for a signal.

A test that stops a sweep or a search in its middle thus finds it there, however fast the machine is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from atoll.sim.sweep.runner import RunPool, WorkItem

AFTER = "ATOLL_TEST_PAUSE_AFTER"


def main() -> None:
    """The command; it writes `paused` once $ATOLL_TEST_PAUSE_AFTER runs or trials have ended."""
    from atoll.cli.start import main as start

    work, left = RunPool.work, int(os.environ[AFTER])

    def pausing(
        crew: RunPool, draw: Callable[[], WorkItem | None], ended: Callable[[WorkItem, Any, str | None], None]
    ) -> None:
        def counted(piece: WorkItem, result: Any, died: str | None) -> None:
            nonlocal left
            ended(piece, result, died)
            left -= 1
            if left == 0:
                sys.stdout.write("paused\n")
                sys.stdout.flush()
                signal.pause()

        work(crew, draw, counted)

    RunPool.work = pausing  # type: ignore[method-assign]
    start()
