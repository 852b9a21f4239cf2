"""One job, three places, the same final bits: in process, on Ray, over real TLS, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocol.child import free_port
from protocol.job import Job
from server.provision import provision
from server.rundir import job_toml
from server.submit import status, submit
from sim.engine import simulate
from sim.shards import write_shards
from tests.federation.news import news_file
from tests.test_backbones import tiny_bert

pytestmark = [pytest.mark.federation, pytest.mark.timeout(300)]

CLIENTS = 4


def jobs(folder: Path) -> dict[str, Job]:
    """A text job and an image job whose data and weights lie in `folder`."""
    common = {"seed": 21, "federation": {"clients": CLIENTS, "cohort": 3, "rounds": 3}}
    text = {
        "name": "news",
        "task": {"name": "text-classification"},
        "data": {"source": str(news_file(folder / "news.csv"))},
        "backbone": {"name": str(tiny_bert(folder / "bert")), "max_tokens": 16},
        "tune": {"method": "lora", "rank": 2},
        "train": {"lr": 0.05, "batch_size": 8, "epochs": 2},
    }
    image = {
        "name": "digits",
        "task": {"name": "image-classification"},
        "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
        "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32},
        "train": {"lr": 0.02, "batch_size": 16},
    }
    return {
        f"{table['name']}-{strategy}": Job.parse(
            common | table | {"strategy": {"name": strategy}},  # type: ignore[operator]
            origin="test",
        )
        for table in (text, image)
        for strategy in ("fedavg", "fedadam")
    }


def unwatched(step: str, what: dict[str, Any]) -> None: ...


@dataclass
class Places:
    """The jobs, what they give in process, and a running server that sites can join."""

    folder: Path
    jobs: dict[str, Job]
    expected: dict[str, str]
    server: Path

    @contextmanager
    def sites(self, name: str, order: list[int]) -> Iterator[None]:
        """All clients of a job as real sites, started in the given order."""
        shards = self.folder / f"shards-{name}"
        if not shards.exists():
            write_shards(self.jobs[name], shards)
        running = []
        try:
            for number in order:
                client = f"client-{number:04d}"
                kit, data = self.folder / "kits" / client, shards / client
                running.append(atoll(self.folder / f"{client}.log", "join", str(kit), "--data", str(data)))
                time.sleep(0.3)
            wait_online(self.server, CLIENTS)
            yield
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(timeout=60)
            wait_online(self.server, 0)

    def submit(self, name: str) -> dict[str, Any]:
        """Run a job on the federation; its result."""
        import json

        out = self.folder / f"run-{name}-{time.monotonic_ns()}"
        submit(self.jobs[name].canonical, self.server, out=out)
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
        return result


def atoll(log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """A verb of the command line as a process of its own."""
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-m", "atoll", *arguments], stdout=output, stderr=output)


def wait_online(server: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(status(server).online) != count:
        assert time.monotonic() < deadline, f"{status(server).online} online, expected {count}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    sites = "".join(f'[[site]]\nname = "client-{i:04d}"\n' for i in range(CLIENTS))
    (folder / "sites.toml").write_text(f'[server]\nhost = "127.0.0.1"\nport = {free_port()}\n{sites}')
    provision(folder / "sites.toml", folder / "kits")
    made = jobs(folder)
    expected = {n: simulate(j, folder / f"sim-{n}", watch=unwatched)["model_sha256"] for n, j in made.items()}
    server = atoll(folder / "serve.log", "serve", str(folder / "kits" / "server"))
    try:
        deadline = time.monotonic() + 90
        while b"ready on" not in (folder / "serve.log").read_bytes():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "serve.log").read_text()
            time.sleep(0.3)
        yield Places(folder, made, expected, folder / "kits" / "server")
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.parametrize(("name", "order"), [("digits", [2, 0, 3, 1]), ("news", [3, 1, 0, 2])])
def test_real_sites_that_join_in_any_order_give_the_bits_of_the_simulation(
    places: Places, name: str, order: list[int]
) -> None:
    with places.sites(f"{name}-fedavg", order):
        for strategy in ("fedavg", "fedadam"):
            result = places.submit(f"{name}-{strategy}")
            assert result["model_sha256"] == places.expected[f"{name}-{strategy}"]
            assert result["engine"] == "flower"
            assert set(result["final"]["clients"]) == {f"client-{i:04d}" for i in range(CLIENTS)}
            assert all(not line["set_aside"] for line in result["rounds"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam"])
def test_ray_gives_the_bits_of_the_simulation(places: Places, name: str) -> None:
    result = simulate(
        places.jobs[name], places.folder / f"ray-{name}", engine="ray", workers=2, watch=unwatched
    )
    assert result["model_sha256"] == places.expected[name]
    assert result["engine"] == "ray"


@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam"])
def test_four_workers_give_the_bits_of_one(places: Places, name: str) -> None:
    result = simulate(places.jobs[name], places.folder / f"workers-{name}", workers=4, watch=unwatched)
    assert result["model_sha256"] == places.expected[name]


@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam"])
def test_a_killed_and_resumed_run_gives_the_same_bits(places: Places, name: str) -> None:
    import json

    job = places.folder / f"{name}.toml"
    job.write_text(job_toml(places.jobs[name]))
    out = places.folder / f"killed-{name}"
    log = places.folder / f"killed-{name}.log"
    process = atoll(log, "simulate", str(job), "--out", str(out))
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "round-000001").exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists(), "it was too fast to be killed"
    assert atoll(log, "simulate", str(job), "--out", str(out), "--resume").wait() == 0, log.read_text()
    assert json.loads((out / "result.json").read_text())["model_sha256"] == places.expected[name]
