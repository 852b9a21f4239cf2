"""Fifty kills in the middle of private rounds: the ledgers never hold less than what was released."""

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from privacy.ledger import Ledger
from protocol.job import Job

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


def play(unit: str, out: Path, seen: Path) -> None:
    """In a process that will be killed: go on with the run, and note every round whose model is out."""
    from sim.engine import simulate

    def watch(step: str, what: dict[str, Any]) -> None:
        if step == "round":
            with seen.open("a") as file:
                file.write(f"{what['round']}\n")

    simulate(job(unit), out, watch=watch, resume=(out / "job.toml").is_file())


def rounds(seen: Path) -> int:
    return len(seen.read_text().split()) if seen.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("unit", PROMISES)
def test_twenty_five_kills_lose_no_charge_of_a_release(unit: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sim.engine"])
    out, seen, draw = tmp_path / "run", tmp_path / "seen", random.Random(7)
    for kills in range(1, 26):
        before = rounds(seen)
        player = context.Process(target=play, args=(unit, out, seen))
        player.start()
        deadline = time.monotonic() + 60
        while rounds(seen) == before:
            assert player.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        assert player.pid is not None
        os.kill(player.pid, 9)
        player.join()
        for path, owner in ledgers(unit, out):
            charged = len(Ledger.open(path, owner).entries)
            assert rounds(seen) <= charged <= rounds(seen) + 2 * kills


def ledgers(unit: str, out: Path) -> list[tuple[Path, str]]:
    if unit == "client":
        return [(out / "ledger.jsonl", job(unit).hash)]
    return [(out / "ledgers" / f"{name}.jsonl", f"example of {name}") for name in CLIENTS]
