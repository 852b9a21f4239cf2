"""How a resident process is told to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised in the middle of work by SIGTERM or SIGINT; no handler of errors may swallow it."""


@contextmanager
def stop_on_signals(stop: threading.Event, *, working: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Within, SIGTERM and SIGINT set `stop`, and the first one raises Interrupted if we are working.

    Outside the main thread signals are someone else's: nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        first = not stop.is_set()
        stop.set()
        if first and working():
            raise Interrupted

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
