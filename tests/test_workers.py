"""How many workers a job gets where nobody says, and that its bits don't depend on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from atoll.cli import run as command_line
from server.rundir import job_toml
from sim.engine import usual_workers
from tests.small import image_job

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("tables", "engine", "expected"),
    [
        ({"tune": {"method": "full"}}, "inline", min(CORES, 4)),
        ({"tune": {"method": "full"}, "train": {"threads": 64}}, "inline", 1),
        ({"tune": {"method": "full"}, "federation": {"clients": 4, "cohort": 1, "rounds": 1}}, "inline", 1),
        ({"tune": {"method": "full"}, "train": {"device": "cuda"}}, "inline", 1),
        ({"tune": {"method": "full"}}, "loop", 1),
        ({"tune": {"method": "full"}}, "ray", 1),
        ({"tune": {"method": "head"}}, "inline", 1),
        ({"tune": {"method": "head"}, "train": {"augment": ["flip"]}}, "inline", min(CORES, 4)),
    ],
    ids=str,
)
def test_clients_that_train_one_after_the_other_share_out_the_cores(
    tables: dict[str, Any], engine: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PHYS_PAGES": 1 << 30, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    federation = {"federation": {"clients": 4, "rounds": 1}}
    assert usual_workers(image_job("mobilenet_v2", **(federation | tables)), engine) == expected


def test_every_worker_has_four_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    job = image_job("mobilenet_v2", tune={"method": "full"}, federation={"clients": 64, "rounds": 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 21 << 18, "SC_PAGE_SIZE": 1 << 12}.__getitem__)
    assert usual_workers(job, "inline") == 5


@pytest.mark.slow
def test_the_command_line_shares_out_the_cores_and_ends_in_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.engine.usual_workers", lambda job, engine: 2)
    few = {"data": {"source": "digits", "test_fraction": 0.9}, "federation": {"clients": 2, "rounds": 1}}
    job = image_job("squeezenet1_1", tune={"method": "full"}, **few)
    found = []
    for name, options in {"said": ["--workers", "1"], "unsaid": []}.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(job_toml(job))
        assert command_line(["simulate", str(path), "--out", str(tmp_path / name), *options]) == 0
        found.append(json.loads((tmp_path / name / "result.json").read_text())["model_sha256"])
        said = capsys.readouterr()
        assert ("in 2 processes" in said.out + said.err) == (name == "unsaid")
    assert found[0] == found[1]
