"""How long each test file may take: `python -m tests.budget` holds the last run to `tests/budget.toml`.

Seconds are a quiet machine's with two cores. Another machine, or a busy one, takes longer everywhere, so
the budgets are stretched by the median of seconds / budget over all files before they are compared: a file
fails that has grown against the others, by half or more.
"""

from __future__ import annotations

import json
import statistics
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "tests" / "budget.toml"
RECORD = ROOT / ".test-durations.json"
LEEWAY = 1.5
SMALL = 2.0
"""Seconds below which a file's time is chance."""
SHOWN = 10


def budgets() -> dict[str, float]:
    """Seconds by file, `federation/test_wire.py` for one in a folder."""
    table: dict[str, float] = tomllib.loads(BUDGET.read_text("utf-8"))["seconds"]
    return table


def over_budget(found: dict[str, float], allowed: dict[str, float]) -> tuple[list[str], float]:
    """(a line for every file that takes too long or has no budget, how much slower than the budgets all is).

    >>> over_budget({"a": 10.0, "b": 10.0, "c": 40.0}, {"a": 5.0, "b": 5.0, "c": 5.0})
    (['c: 40 s, its budget is 5 s, here 10 s'], 2.0)
    """
    ratios = [found[file] / allowed[file] for file in found if allowed.get(file, 0.0) >= SMALL]
    slower = max(1.0, statistics.median(ratios)) if ratios else 1.0
    lines = []
    for file, seconds in sorted(found.items()):
        if seconds > SMALL * slower and file not in allowed:
            lines.append(f"{file}: {seconds:.0f} s, and no budget in tests/budget.toml")
        elif seconds > LEEWAY * slower * max(allowed.get(file, 0.0), SMALL):
            here = allowed[file] * slower
            lines.append(f"{file}: {seconds:.0f} s, its budget is {allowed[file]:.0f} s, here {here:.0f} s")
    return lines, slower


def main() -> int:
    """Show the ten files that took longest, and those over their budget; 1 if there are any."""
    if not RECORD.exists():
        sys.stdout.write("test budget: no run is recorded here yet\n")
        return 0
    allowed = budgets()
    found = {
        file: s for file, s in json.loads(RECORD.read_text()).items() if (ROOT / "tests" / file).exists()
    }
    lines, slower = over_budget(found, allowed)
    sys.stdout.write(f"test budget: {sum(found.values()):.0f} s recorded, {slower:.1f} times the budgets\n")
    for file, seconds in sorted(found.items(), key=lambda item: -item[1])[:SHOWN]:
        sys.stdout.write(f"  {seconds:6.0f} s  {file}\n")
    for line in lines:
        sys.stdout.write(f"over budget: {line}\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
