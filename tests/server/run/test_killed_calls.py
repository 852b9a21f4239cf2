"""A run that is killed with signal 9 at every single system call by which it keeps something."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.job.job import Job
from atoll.privacy.ledger import Ledger
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.server.run.test_full_disk import JOB, ROUNDS
from tests.support.processes import python

MANY = 1_000_000
PROMISE = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2, "seeded_noise": True}
PRIVATE = Job.parse({**JOB.model_dump(mode="json", exclude_none=True), "privacy": PROMISE}, origin="test")
PLAYER = """
import os, signal, sys
from pathlib import Path
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.system import durable_files
from tests.server.run.test_killed_calls import PRIVATE

class Counted:
    left = int(sys.argv[2])

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "ftruncate", "replace", "unlink"):
            return real

        def call(*given, **named):
            Counted.left -= 1
            if Counted.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

durable_files.os = Counted()
simulate(PRIVATE, Path(sys.argv[1]), on_event=ignore_events, report=False)
print(Counted.left)
"""
"""A run that is killed just before its call of that number; else it says how many were left."""


@pytest.mark.matrix
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_a_run_killed_at_any_call_that_keeps_something_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    expected = simulate(PRIVATE, tmp_path / "whole", on_event=ignore_events, report=False).model_sha256
    told, _ = python(PLAYER, tmp_path / "counted", MANY).communicate()
    calls = MANY - int(told)
    assert calls > 10 * ROUNDS
    for number in range(1, calls + 1):
        out = tmp_path / str(number)
        assert python(PLAYER, out, number, output=False).wait() == -9
        resume = (out / "job.toml").is_file()
        result = simulate(PRIVATE, out, on_event=ignore_events, report=False, resume=resume)
        assert result.model_sha256 == expected, f"killed at call {number} of {calls}"
        assert [line["round"] for line in result.rounds] == [*range(1, ROUNDS + 1)]
        charged = [entry.round for entry in Ledger.open(out / "ledger.jsonl", PRIVATE.hash).entries]
        assert charged == [*range(1, ROUNDS + 1)]
