"""Every task, every way of tuning, on two real sites over TLS: the bits of the simulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from protocol.job import Job
from sim.engine import simulate
from sim.population import client_names
from sim.shards import write_shards
from tests.federation.places import Federation, federation_of, unwatched
from tests.task_data import ready
from tests.task_jobs import DRAWING, TABLES, job_of
from tests.test_tasks import METHODS, WORKING

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation_of(tmp_path_factory.mktemp("tasks"), *client_names(2)) as running:
        yield running


ONE_EACH = [pytest.param("recommendation", ("full",))]
ALL = [
    pytest.param(task, tuple(m for m in METHODS if (task, m) in WORKING), marks=pytest.mark.matrix)
    for task in TABLES
]


@pytest.mark.parametrize(("task", "methods"), ONE_EACH + ALL)
def test_two_real_sites_give_the_bits_of_the_simulation(
    federation: Federation, task: str, methods: tuple[str, ...], tmp_path: Path
) -> None:
    """All ways of tuning take turns at the same two sites."""
    agree(federation, [ready(job_of(task, method), tmp_path) for method in methods], tmp_path)


@pytest.mark.matrix
def test_a_detector_that_draws_draws_at_real_sites_what_it_draws_in_simulation(
    federation: Federation, tmp_path: Path
) -> None:
    agree(federation, [ready(job_of("object-detection", "head", backbone=DRAWING), tmp_path)], tmp_path)


def agree(federation: Federation, jobs: Sequence[Job], folder: Path) -> None:
    """Two sites join with the first job's shards; every job ends there with the bits of the simulation."""
    names = write_shards(jobs[0], folder / "shards")
    try:
        for name in names:
            federation.join(
                name, folder / "shards" / name, env={"ATOLL_CACHE": str(folder / f"cache-{name}")}
            )
        federation.wait_online(*names)
        for job in jobs:
            result = federation.run(job)
            expected = simulate(job, folder / job.name, watch=unwatched, report=False)
            assert result["model_sha256"] == expected["model_sha256"], job.name
            assert result["final"]["clients"].keys() == expected["final"]["clients"].keys()
    finally:
        for name in names:
            federation.running[name].process.terminate()
        federation.wait_alone()
