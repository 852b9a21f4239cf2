"""Kills in the middle of private rounds: the ledgers never hold less than what was released."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from atoll.job.job import Job
from atoll.privacy.ledger import Ledger
from tests.support.processes import python, wait_until

CLIENTS = ("client-0000", "client-0001", "client-0002")
PROMISES: dict[str, dict[str, Any]] = {
    "client": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2},
    "example": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5, "steps": 2},
}


def job(unit: str) -> Job:
    table = {
        "name": "crashes", "seed": 1,
        "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": 3, "rounds": 100_000}, "evaluate": {"every": 1_000_000},
        "privacy": PROMISES[unit],
    }  # fmt: skip
    return Job.parse(table, origin="test")


PLAYER = """
import sys
from pathlib import Path
from atoll.server.events import RoundEnded
from atoll.sim.engines.engine import simulate
from tests.privacy.runs.test_private_crashes import job
def on_event(event):
    if isinstance(event, RoundEnded):
        with Path(sys.argv[3]).open("a") as file:
            file.write(f"{event.line['round']}\\n")
out = Path(sys.argv[2])
simulate(job(sys.argv[1]), out, on_event=on_event, report=False, resume=(out / "job.toml").is_file())
"""
"""Goes on with the run, and notes every round whose model is out."""


def rounds(seen: Path) -> int:
    return len(seen.read_text().split()) if seen.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("unit", PROMISES)
@pytest.mark.parametrize("times", [10, pytest.param(25, marks=pytest.mark.matrix)])
@pytest.mark.processes
def test_kills_lose_no_charge_of_a_release(unit: str, times: int, tmp_path: Path) -> None:
    out, seen, draw = tmp_path / "run", tmp_path / "seen", random.Random(7)
    for kills in range(1, times + 1):
        before = rounds(seen)
        player = python(PLAYER, unit, out, seen, output=False)
        wait_until(lambda: rounds(seen) != before, "round", alive=lambda: player.poll() is None)  # noqa: B023
        time.sleep(draw.random() * 0.1)
        player.kill()
        player.wait()
        for path, owner in ledgers(unit, out):
            charged = len(Ledger.open(path, owner).entries)
            assert rounds(seen) <= charged <= rounds(seen) + 2 * kills


def ledgers(unit: str, out: Path) -> list[tuple[Path, str]]:
    if unit == "client":
        return [(out / "ledger.jsonl", job(unit).hash)]
    return [(out / "ledgers" / f"{name}.jsonl", f"example of {name}") for name in CLIENTS]
