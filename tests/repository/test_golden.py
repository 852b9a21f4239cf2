"""The bits of small jobs are what they were, on processors and with versions where they were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.job.job import Job
from tests.repository.golden import FILE, bits, jobs, place

pytestmark = [pytest.mark.slow, pytest.mark.processes]

RECORDS: list[dict[str, dict[str, str]]] = json.loads(FILE.read_text())


def changed(record: dict[str, dict[str, str]]) -> list[str]:
    """What is other here than where the bits were recorded."""
    here = place()
    return [f"{key}: {record['place'].get(key)} there, {here[key]} here" for key in here if
            record["place"].get(key) != here[key]]  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    """The bits that were recorded for this processor and these versions."""
    nearest = min(RECORDS, key=lambda record: len(changed(record)))
    if changed(nearest):
        pytest.skip(f"no bits are recorded for this place: {'; '.join(changed(nearest))}")
    return nearest["bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def test_every_job_is_recorded_once() -> None:
    names = [name for name, _, _ in jobs()]
    assert len(names) == len(set(names))
    assert list(RECORDS[-1]["bits"]) == names
    assert all(set(record["bits"]) <= set(names) for record in RECORDS)


@pytest.mark.parametrize(("name", "make", "options"), [pytest.param(*job, id=job[0]) for job in jobs()])
def test_the_bits_are_what_they_were(
    name: str, make: Callable[[Path], Job], options: dict[str, Any], recorded: dict[str, str], folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    if name not in recorded:
        pytest.skip("its bits were changed on purpose, and have not been recorded on this processor since")
    assert bits(make, folder, tmp_path / "run", options) == recorded[name]
