"""One job, three places, the same final bits: in process, on Ray, over real TLS, and after a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.job import Job
from server.rundir import job_toml
from sim.engine import simulate
from sim.population import client_names
from sim.shards import write_shards
from tests.federation.news import news_file
from tests.federation.places import Federation, atoll, federation_of, result_of, unwatched
from tests.test_backbones import tiny_bert
from tests.test_simulation import kill_after

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]

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
    augment = {"augment": ["crop", "flip", "color"], "epochs": 2}
    views = image | {"name": "views", "train": image["train"] | augment | {"cached_views": 3}}  # type: ignore[operator]
    varied = image | {"name": "varied", "train": image["train"] | augment}  # type: ignore[operator]
    fused = {"channels_last": True, "compile": True}
    compiled = image | {"name": "compiled", "backbone": image["backbone"] | fused}  # type: ignore[operator]
    made = {
        f"{table['name']}-{strategy}": Job.parse(
            common | table | {"strategy": {"name": strategy}},  # type: ignore[operator]
            origin="test",
        )
        for table in (text, image, views, varied, compiled)
        for strategy in ("fedavg", "fedadam")
    }
    small = made["digits-fedavg"]
    travels = small.federation.model_copy(update={"compression": "int8"})
    made["small-fedavg"] = small.model_copy(update={"name": "small", "federation": travels})
    later = [{"method": "last-k", "layers": 1, "after": 1}, {"method": "full", "after": 1, "lr": 0.001}]
    made["grown-fedavg"] = Job.parse(
        common | image | {"name": "grown", "tune": {"method": "head", "then": later}}, origin="test"
    )
    whole = text | {"tune": {"method": "full"}}
    taught = {"teacher": str(folder / "teacher"), "teacher_weight": 0.8}
    for table in (
        whole | {"name": "taught", "train": text["train"] | taught},  # type: ignore[operator]
        whole | {"name": "pruned", "backbone": text["backbone"] | {"prune": 0.5}},  # type: ignore[operator]
    ):
        made[f"{table['name']}-fedavg"] = Job.parse(common | table, origin="test")
    return made


@dataclass
class Places:
    """The jobs, what they give in process, and a running server that sites can join."""

    folder: Path
    jobs: dict[str, Job]
    known: dict[str, str]
    federation: Federation

    def expected(self, name: str) -> str:
        """The `model_sha256` of the simulation."""
        if name not in self.known:
            out = self.folder / f"sim-{name}"
            self.known[name] = simulate(self.jobs[name], out, watch=unwatched, report=False)["model_sha256"]
        return self.known[name]

    @contextmanager
    def sites(self, name: str, order: list[int]) -> Iterator[None]:
        """All clients of a job as real sites, started in the given order, each with a cache of its own."""
        shards = self.folder / f"shards-{name}"
        if not shards.exists():
            write_shards(self.jobs[name], shards)
        names = [f"client-{number:04d}" for number in order]
        try:
            for client in names:
                cache = {"ATOLL_CACHE": str(self.folder / f"cache-{client}")}
                self.federation.join(client, shards / client, env=cache)
            self.federation.wait_online(*names)
            yield
        finally:
            for client in names:
                self.federation.running[client].process.terminate()
            self.federation.wait_alone()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    made = jobs(folder)
    with federation_of(folder, *client_names(CLIENTS)) as federation:
        yield Places(folder, made, {}, federation)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["digits-fedadam", "views-fedavg"], [2, 0, 3, 1]),
        (["news-fedadam"], [3, 1, 0, 2]),
        pytest.param(["digits-fedavg", "views-fedadam"], [0, 1, 2, 3], marks=pytest.mark.matrix),
        pytest.param(["news-fedavg"], [2, 1, 0, 3], marks=pytest.mark.matrix),
        pytest.param(
            ["varied-fedavg", "compiled-fedavg", "varied-fedadam", "compiled-fedadam"], [1, 3, 2, 0],
            marks=pytest.mark.matrix,
        ),
    ],
)  # fmt: skip
def test_real_sites_that_join_in_any_order_give_the_bits_of_the_simulation(
    places: Places, names: list[str], order: list[int]
) -> None:
    """Jobs on the same shards take turns at the same sites."""
    with places.sites(names[0], order):
        for job in names:
            result = places.federation.run(places.jobs[job])
            assert result["model_sha256"] == places.expected(job)
            assert result["engine"] == "flower"
            assert set(result["final"]["clients"]) == {f"client-{i:04d}" for i in range(CLIENTS)}
            assert all(not line["set_aside"] for line in result["rounds"])


@pytest.mark.matrix
def test_real_sites_with_a_teacher_or_a_pruned_backbone_give_the_bits_of_the_simulation(
    places: Places,
) -> None:
    simulate(places.jobs["news-fedavg"], places.folder / "teacher", watch=unwatched, report=False)
    with places.sites("news-fedavg", [1, 0, 3, 2]):
        for name in ("taught-fedavg", "pruned-fedavg"):
            result = places.federation.run(places.jobs[name])
            assert result["model_sha256"] == places.expected(name) != places.expected("news-fedavg")
            assert all(not line["set_aside"] for line in result["rounds"])


def test_real_sites_that_compress_and_remember_or_tune_ever_more_give_the_bits_of_the_simulation(
    places: Places,
) -> None:
    with places.sites("digits-fedavg", [1, 0, 2, 3]):
        result = places.federation.run(places.jobs["small-fedavg"])
        grown = places.federation.run(places.jobs["grown-fedavg"])
    assert grown["model_sha256"] == places.expected("grown-fedavg")
    assert [line["tuning"] for line in grown["rounds"]] == ["head", "last-k with layers = 1", "full"]
    assert result["model_sha256"] == places.expected("small-fedavg") != places.expected("digits-fedavg")
    assert all(not line["set_aside"] for line in result["rounds"])
    assert result["bytes_up"] < result["bytes_down"] / 3.9
    for number in range(CLIENTS):
        kept = places.federation.kits[f"client-{number:04d}"] / "state" / "memory"
        trained = [line["round"] for line in result["rounds"] if f"client-{number:04d}" in line["cohort"]]
        found = sorted(kept.rglob("*.safetensors"))
        assert [path.name for path in found] == [f"round-{round:06d}.safetensors" for round in trained]
        assert all(path.stat().st_mode & 0o077 == 0 for path in found)


@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam", "views-fedadam", "varied-fedavg"])
def test_ray_gives_the_bits_of_the_simulation(places: Places, name: str) -> None:
    result = simulate(
        places.jobs[name],
        places.folder / f"ray-{name}",
        engine="ray",
        workers=2,
        watch=unwatched,
        report=False,
    )
    assert result["model_sha256"] == places.expected(name)
    assert result["engine"] == "ray"


@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam"])
def test_four_workers_give_the_bits_of_one(places: Places, name: str) -> None:
    result = simulate(
        places.jobs[name], places.folder / f"workers-{name}", workers=4, watch=unwatched, report=False
    )
    assert result["model_sha256"] == places.expected(name)


@pytest.mark.parametrize("name", ["digits-fedavg", "news-fedadam"])
def test_a_killed_and_resumed_run_gives_the_same_bits(places: Places, name: str) -> None:
    job, out = places.folder / f"{name}.toml", places.folder / f"killed-{name}"
    job.write_text(job_toml(places.jobs[name]))
    kill_after(1, 2, 0, job, out)
    resumed = atoll(places.folder / f"{name}.log", "simulate", str(job), "--out", str(out), "--resume")
    assert resumed.ends() == 0, resumed.text()
    assert result_of(out)["model_sha256"] == places.expected(name)
