"""What a run of many rounds and clients keeps in memory: under a kilobyte a round, and nothing is lost."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from atoll.job.job import Job
from atoll.server.events import Event, RoundEnded
from atoll.server.rounds.compact_log import BLOCK, CompactLog
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import client_names

CLIENTS = 100
BYTES_A_ROUND = 400
"""Beside what the rounds themselves leave to the system, so that 1,000 rounds take less than 1 MB."""


def line(round: int) -> dict[str, object]:
    """A round's line, each with names of its own, as sampling makes them."""
    return {
        "round": round, "cohort": [str(name) for name in client_names(CLIENTS)], "loss": round / 7,
        "metrics": {"accuracy": 1 / round, "loss": None, "odd": float("inf")}, "trained": CLIENTS,
        "seconds": 0.1 * round, "set_aside": {"client-0003": "disk full"}, "model_sha256": f"{round:064x}",
    }  # fmt: skip


def test_lines_are_read_as_they_were_written_one_by_one_in_part_and_from_the_end() -> None:
    lines = [line(round) for round in range(1, BLOCK + 6)]
    log = CompactLog()
    assert not log and list(log) == log[:] == []
    for one in lines:
        log.append(one)  # type: ignore[arg-type]
    assert list(log) == log[:] == lines and len(log) == len(lines)
    for place in (0, 3, BLOCK - 1, BLOCK, len(lines) - 1, -1, -5, -len(lines)):
        assert log[place] == lines[place]
    assert log[1:3] == lines[1:3] and log[BLOCK - 2 :] == lines[BLOCK - 2 :]
    with pytest.raises(IndexError):
        log[len(lines)]
    assert list(CompactLog.of(lines)) == lines  # type: ignore[arg-type]


def test_a_thousand_lines_of_a_hundred_clients_take_less_than_half_a_megabyte() -> None:
    log = CompactLog()
    tracemalloc.start()
    try:
        for round in range(1, 1001):
            log.append(line(round))  # type: ignore[arg-type]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 1000 * BYTES_A_ROUND


FIRST, LAST = 10, 50
BLOCKS_A_ROUND = 30
"""Of Python's small memory blocks; a name of a client is one, and a line kept as it is 113."""


def test_a_run_with_a_hundred_clients_keeps_next_to_nothing_of_a_round(tmp_path: Path) -> None:
    table = {
        "name": "long", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": CLIENTS, "rounds": LAST},
        "evaluate": {"every": 1_000, "baselines": [], "clients": 1},
    }  # fmt: skip
    blocks: dict[int, int] = {}

    def look(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] in (FIRST, LAST):
            gc.collect()
            blocks[event.line["round"]] = sys.getallocatedblocks()

    result = simulate(Job.parse(table, origin="test"), tmp_path / "run", on_event=look, report=False)
    assert blocks[LAST] - blocks[FIRST] < (LAST - FIRST) * BLOCKS_A_ROUND
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.rounds == lines and len(lines) == LAST and len(lines[0]["cohort"]) == CLIENTS
