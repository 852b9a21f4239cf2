"""The most memory that processes hold while something runs."""

from __future__ import annotations

import threading

from atoll.system.memory import tree_bytes

SECONDS_BETWEEN_LOOKS = 0.1

Held = dict[str, tuple[float, float]]
"""MB by who holds them."""


class Peak(threading.Thread):
    """The most that some processes and their descendants hold, while it runs: (in all, without files)."""

    def __init__(self, processes: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.mb = dict.fromkeys(processes, (0.0, 0.0))
        self._processes, self._ended = processes, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            self.look()

    def look(self) -> Held:
        """The most until now, and at present."""
        for name, process in self._processes.items():
            whole, own = self.mb[name]
            whole = max(whole, tree_bytes(process) / 1e6)
            self.mb[name] = whole, max(own, tree_bytes(process, files=False) / 1e6)
        return self.mb

    def stop(self) -> Held:
        """What was seen."""
        self._ended.set()
        self.join()
        return self.mb
