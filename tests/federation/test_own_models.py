"""Two real sites that keep their heads, and two that send sums: the bits of the simulation."""

from pathlib import Path
from typing import Any

import pytest

from protocol.job import Job
from sim.engine import simulate
from sim.population import client_names
from sim.shards import write_shards
from tests.federation.news import news_file
from tests.federation.places import federation_of, unwatched
from tests.test_backbones import tiny_bert

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]


def test_sites_that_keep_their_heads_or_send_sums_give_the_bits_of_the_simulation(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "seed": 21,
        "task": {"name": "text-classification"},
        "data": {"source": str(news_file(tmp_path / "news.csv")), "validation_fraction": 0.3},
        "backbone": {"name": str(tiny_bert(tmp_path / "bert")), "max_tokens": 16},
        "train": {"lr": 0.05, "batch_size": 8},
        "federation": {"clients": 2, "rounds": 3},
    }
    tables: dict[str, dict[str, Any]] = {
        "own-heads": {"tune": {"method": "lora", "rank": 2}, "personal": {"keep": "head"}},
        "mixture": {"personal": {"keep": "mixture"}},
        "ridge": {"tune": {"head_init": "ridge"}},
    }
    jobs = [Job.parse(common | table | {"name": name}, origin="test") for name, table in tables.items()]
    expected = {job.name: simulate(job, tmp_path / job.name, watch=unwatched, report=False) for job in jobs}
    write_shards(jobs[0], tmp_path / "shards")
    names = client_names(2)
    with federation_of(tmp_path, *names) as federation:
        for name in names:
            cache = {"ATOLL_CACHE": str(tmp_path / f"cache-{name}")}
            federation.join(name, tmp_path / "shards" / name, env=cache)
        federation.wait_online(*names)
        for job in jobs:
            result = federation.run(job)
            simulated = expected[job.name]
            assert result["engine"] == "flower" and not any(line["set_aside"] for line in result["rounds"])
            assert result["model_sha256"] == simulated["model_sha256"]
            assert result["final"]["clients"] == simulated["final"]["clients"]
            assert result["personal"] == simulated["personal"]
        kept = [list((federation.kits[n] / "state" / "memory").rglob("*.safetensors")) for n in names]
        assert [len(files) for files in kept] == [6, 6]  # three rounds of two runs
        assert all(path.stat().st_mode & 0o077 == 0 for files in kept for path in files)
