"""Disks that refuse one thing in a run: the rounds before stay, and it goes on to the same bits."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.datasets.synthetic.png import grey_png
from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.rounds import start
from atoll.server.run import checkpoint
from atoll.sim.engines.engine import simulate
from atoll.system import durable_files
from tests.data.test_bad_data import snapshot

ROUNDS, FAILS_AFTER = 4, 2
JOB = Job.parse(
    {
        "name": "full", "seed": 3, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8}, "federation": {"clients": 3, "rounds": ROUNDS},
        "strategy": {"name": "fedadam"}, "evaluate": {"every": ROUNDS, "baselines": []},
    },
    origin="test",
)  # fmt: skip


@dataclass
class FailingDisk:
    """The module `os`, where one call fails on files with these words in their path that are written."""

    call: str
    words: str
    number: int

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name != self.call:
            return real

        def failing(target: Any, *rest: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)  # noqa: PTH115
            reads = name == "open" and not rest[0] & os.O_WRONLY
            if self.words in path and not reads:
                raise OSError(self.number, os.strerror(self.number), path)
            return real(target, *rest, **named)

        return failing


def run(out: Path, **options: Any) -> RunResult:
    return simulate(JOB, out, **{"on_event": ignore_events, "report": False, **options})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run that nothing disturbs."""
    return run(tmp_path_factory.mktemp("undisturbed") / "run").model_sha256


@pytest.fixture(autouse=True)
def every_round_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "loses_no_round", lambda job: True)


def failing_from(disk: FailingDisk, patch: pytest.MonkeyPatch) -> Any:
    """What is called with events: after the second round the disk is that one."""

    def on_event(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == FAILS_AFTER:
            patch.setattr(durable_files, "os", disk)

    return on_event


FAULTS = {
    "no room": ("write", errno.ENOSPC),
    "no room once it is synced": ("fsync", errno.ENOSPC),
    "no inodes": ("open", errno.ENOSPC),
    "an error as it is written": ("write", errno.EIO),
    "an error as it is synced": ("fsync", errno.EIO),
    "an error as it is renamed": ("replace", errno.EIO),
    "mounted anew to be read alone": ("open", errno.EROFS),
    "no descriptor left": ("open", errno.EMFILE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line_and_it_goes_on_to_the_same_bits(
    fault: str, tmp_path: Path, expected: str
) -> None:
    call, number = FAULTS[fault]
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(JobError) as ended:
        run(out, on_event=failing_from(FailingDisk(call, "/checkpoints/", number), patch))
    line = str(ended.value)
    assert line.startswith(
        f"{out}/checkpoints/round-00000{FAILS_AFTER + 1}.safetensors: checkpoint not written"
    )
    assert f"({os.strerror(number)})" in line and "\n" not in line
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"round-00000{round}.safetensors" for round in (FAILS_AFTER - 1, FAILS_AFTER)]
    assert not (out / "result.json").exists()
    assert run(out, resume=True).model_sha256 == expected


@pytest.mark.parametrize("call", ["open", "write"])
def test_without_room_for_the_log_training_goes_on_and_says_so(
    call: str, tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        disk = FailingDisk(call, "metrics.jsonl", errno.ENOSPC)
        result = run(tmp_path / "run", on_event=failing_from(disk, patch))
    assert result.model_sha256 == expected and len(result.rounds) == ROUNDS
    assert "metrics.jsonl not written (No space left on device)" in caplog.text
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == FAILS_AFTER


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_it_used(
    tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == FAILS_AFTER + 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "run", on_event=stop)
    opened = checkpoint.safe_open

    def unreadable(path: Path, **named: Any) -> Any:
        if path.name == f"round-00000{FAILS_AFTER + 1}.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, **named)

    monkeypatch.setattr(checkpoint, "safe_open", unreadable)
    assert run(tmp_path / "run", resume=True).model_sha256 == expected
    assert f"round-00000{FAILS_AFTER + 1}.safetensors is damaged" in caplog.text


def test_a_run_is_not_gone_on_with_on_data_of_other_classes(tmp_path: Path) -> None:
    for label in "ab":
        for number in range(6):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(grey_png(np.full((8, 8), 10 * number + (label == "b"), np.uint8)))
    data = JOB.data.model_copy(update={"source": str(tmp_path / "data")})
    job = JOB.model_copy(update={"data": data})

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(job, tmp_path / "run", on_event=stop, report=False)
    before = snapshot(tmp_path / "run")
    (tmp_path / "data" / "b").rename(tmp_path / "data" / "c")
    with pytest.raises(ConfigError, match="cannot resume: changed since the checkpoint: classes"):
        simulate(job, tmp_path / "run", on_event=ignore_events, report=False, resume=True)
    assert snapshot(tmp_path / "run") == before
