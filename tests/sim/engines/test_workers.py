"""How many workers a job gets where nobody says, and that its bits don't depend on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.cli.main import run as command_line
from atoll.datasets.synthetic.png import grey_png
from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.learning.determinism import use_shared_gpu
from atoll.learning.learner import Learner
from atoll.protocol.messages import Reply, Update
from atoll.protocol.requests import Request, TrainRequest
from atoll.report.run_result import RunResult
from atoll.server.run.directory import job_toml
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import check_engine, default_workers
from atoll.sim.engines.process_pool import PooledTransport
from atoll.sim.engines.ray import share_of_gpus
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.support.small import few_pictures, image_job

ROOT = Path(__file__).parents[3]
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
    assert default_workers(image_job("mobilenet_v2", **(federation | tables)), engine) == expected


def test_every_worker_has_four_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    job = image_job("mobilenet_v2", tune={"method": "full"}, federation={"clients": 64, "rounds": 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 21 << 18, "SC_PAGE_SIZE": 1 << 12}.__getitem__)
    assert default_workers(job, "inline") == 5


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "chosen"),
    [
        ("cuda", 3, 3, [0, 1, 2, 0]),
        ("cuda", 9, 5, [0, 1, 2, 3]),  # five clients a round
        ("cuda:1", 3, 1, []),
        ("cuda", 1, 1, []),
        ("cpu", 3, None, []),
    ],
)
def test_workers_share_the_gpus_of_a_machine_unless_the_job_names_one(
    device: str, gpus: int, workers: int | None, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    job = image_job(
        "mobilenet_v2",
        tune={"method": "full"},
        train={"device": device},
        federation={"clients": 9, "cohort": 5},
    )
    for worker in range(4):
        use_shared_gpu(device, worker)
    assert used == chosen
    assert workers is None or default_workers(job, "inline") == workers
    assert default_workers(job, "loop") == 1


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "share"),
    [
        ("cpu", 8, 4, 0.0),
        ("cuda", 1, 1, 1.0),
        ("cuda", 1, 3, 0.3333),  # three of them fit, which of 1/3 rounded up would not
        ("cuda", 4, 8, 0.5),
        ("cuda", 4, 3, 1.0),
    ],
)
def test_ray_reserves_for_each_worker_its_share_of_the_gpus(
    device: str, gpus: int, workers: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert share_of_gpus(device, workers) == share


def test_a_gpu_by_its_number_is_refused_on_ray() -> None:
    job = image_job("mobilenet_v2", train={"device": "cuda:1"})
    with pytest.raises(ConfigError, match=r'on Ray.*expected "cuda" or "cpu", found "cuda:1"'):
        check_engine(job, "ray")
    check_engine(job, "inline")


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_line_shares_out_the_cores_and_ends_in_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.sim.engines.engine.default_workers", lambda job, engine: 2)
    few = {"data": few_pictures(24), "federation": {"clients": 2, "rounds": 1}}
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


SMALL: dict[str, Any] = {
    "data": few_pictures(90),
    "tune": {"method": "full"},
    "federation": {"clients": 6, "cohort": 4, "rounds": 3},
    "evaluate": {"every": 3},
}


class Killing(PooledTransport):
    """Kills a worker while it is at work, in the second round."""

    killed = 0

    def send_and_receive(
        self, request: Request, names: Sequence[str], timeout: float
    ) -> Generator[Reply, None, None]:
        for reply in super().send_and_receive(request, names, timeout):
            if request.round == 2 and not self.killed:
                (process,) = self._pools[0]._processes.values()
                process.kill()
                self.killed = process.pid or 0
            yield reply


def run_with(job: Job, carrier: PooledTransport, out: Path) -> RunResult:
    with carrier:
        return run_job(job, carrier, out, carrier.population.test_shard)


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_worker_is_replaced_and_changes_no_bit(tmp_path: Path) -> None:
    job = image_job("squeezenet1_1", **SMALL)
    population = Population.of(job)
    whole = run_with(job, PooledTransport(population, 2, tmp_path / "whole"), tmp_path / "whole")
    carrier = Killing(population, 2, tmp_path / "killed")
    assert run_with(job, carrier, tmp_path / "killed").model_sha256 == whole.model_sha256
    assert carrier.killed


@pytest.mark.slow
@pytest.mark.processes
def test_replies_that_nobody_waits_for_any_more_end_with_their_workers(tmp_path: Path) -> None:
    job = image_job("squeezenet1_1", **SMALL)
    population = Population.of(job)
    asked = asked_of(job, population)
    names = list(population.names(job)[:4])
    with PooledTransport(population, 2, tmp_path / "run") as carrier:
        replies = carrier.send_and_receive(asked, names, 60)
        assert isinstance(next(iter(replies)), Update)
        replies.close()
        assert len(carrier._pools) < 2
        again = {reply.client: reply for reply in carrier.send_and_receive(asked, names, 60)}
    assert sorted(again) == names and all(isinstance(reply, Update) for reply in again.values())


@pytest.mark.slow
@pytest.mark.processes
def test_a_worker_that_died_while_it_had_nothing_to_do_is_replaced(tmp_path: Path) -> None:
    job = image_job("squeezenet1_1", **SMALL)
    population = Population.of(job)
    asked, names = asked_of(job, population), list(population.names(job)[:2])
    with PooledTransport(population, 1, tmp_path / "run") as carrier:
        first = {reply.client: reply for reply in carrier.send_and_receive(asked, names, 60)}
        (process,) = carrier._pools[0]._processes.values()
        process.kill()
        process.join()
        again = {reply.client: reply for reply in carrier.send_and_receive(asked, names, 60)}
    assert sorted(first) == sorted(again) == names
    assert all(isinstance(reply, Update) for reply in again.values())


def asked_of(job: Job, population: Population) -> Request:
    data_info = population.roster(job).data_info
    learner = Learner.of(job, task_named(job.task.name), data_info[0])
    return TrainRequest(job.canonical, job.hash, 1, learner.data_info, learner.initial(), run="run")


@pytest.mark.processes
def test_workers_that_keep_dying_end_the_run_in_one_line(tmp_path: Path) -> None:
    digits = tmp_path / "digits"
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)):
        (digits / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (digits / str(number % 2) / f"{number}.png").write_bytes(grey_png(pixels))
    job = image_job("squeezenet1_1", **SMALL | {"data": {"source": str(digits)}})
    carrier = PooledTransport(Population.of(job), 2, tmp_path / "run")
    shutil.rmtree(digits)  # no worker can read it any more: each dies at its start
    with (
        carrier,
        pytest.raises(JobError, match=r"worker processes died 3 times over client-\d+; out of memory\?"),
    ):
        run_job(job, carrier, tmp_path / "run", lambda learner: None)


@pytest.mark.processes
def test_a_worker_does_not_wait_for_what_plots_are_drawn_with() -> None:
    code = (
        "import sys, atoll.sim.engines.process_pool\n"
        "print(*{'matplotlib', 'seaborn', 'peft'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == []
