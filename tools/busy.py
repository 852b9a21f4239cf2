"""Run a command while the machine is busy: `python -m tools.busy COMMAND …`, two busy loops for each core."""

from __future__ import annotations

import os
import subprocess
import sys

LOOPS_PER_CORE = 2
LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Ends with whoever started it, however that ends."""


def main(command: list[str]) -> int:
    """The command's exit status; the loops end with it."""
    count = LOOPS_PER_CORE * len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    print(f"{count} busy loops beside: {' '.join(command)}", flush=True)
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
