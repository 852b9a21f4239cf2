"""One job, three places, the same final bits: in process, on Ray, over real TLS, and after a kill."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.server.run.directory import job_toml
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import client_names
from atoll.sim.population.write_shards import write_shards
from tests.backbones.test_backbones import tiny_bert
from tests.federation.news import news_file
from tests.federation.places import Federation, atoll, federation_of, result_of
from tests.sim.test_simulation import kill_after
from tests.support.small import few_pictures
from tests.support.task_data import ready
from tests.support.task_jobs import DRAWING, TABLES, job_of
from tests.tasks.test_tasks import METHODS, WORKING

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]

CLIENTS = 3


def jobs(folder: Path) -> dict[str, Job]:
    """A text job and an image job whose data and weights lie in `folder`."""
    common = {"seed": 21, "federation": {"clients": CLIENTS, "cohort": 2, "rounds": 2}}
    text = {
        "name": "news",
        "task": {"name": "text-classification"},
        "data": {"source": str(news_file(folder / "news.csv", 60))},
        "backbone": {"name": str(tiny_bert(folder / "bert")), "max_tokens": 16},
        "tune": {"method": "lora", "rank": 2},
        "train": {"lr": 0.05, "batch_size": 8, "epochs": 2},
    }
    image = {
        "name": "digits",
        "task": {"name": "image-classification"},
        "data": few_pictures(),
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
    stepping = common | image | {"name": "fednova", "strategy": {"name": "fednova"}}  # type: ignore[operator]
    made["fednova"] = Job.parse(stepping, origin="test")
    for name in ("qffl", "afl", "ifca", "pfedme"):
        fair = common | image | {"name": name, "strategy": {"name": name}}  # type: ignore[operator]
        made[name] = Job.parse(fair, origin="test")
    for rule in ("by-size", "power-of-choice", "oort"):
        federation = common["federation"] | {"cohort": 2, "rounds": 4, "selection": rule}  # type: ignore[operator]
        chosen = common | image | {"name": rule, "federation": federation}  # type: ignore[operator]
        made[rule] = Job.parse(chosen, origin="test")
    buffered = {"clients": CLIENTS, "cohort": 1, "concurrency": 2, "rounds": 4}
    late = common | image | {"name": "fedbuff", "strategy": {"name": "fedbuff"}, "federation": buffered}  # type: ignore[operator]
    made["fedbuff"] = Job.parse(late, origin="test")
    grouped = {"clients": CLIENTS, "concurrency": CLIENTS, "rounds": 6}
    steps = {"name": "fedcompass", "options": {"min_steps": 2, "max_steps": 8}}
    late |= {"name": "fedcompass", "strategy": steps, "federation": grouped}
    made["fedcompass"] = Job.parse(late, origin="test")
    signs = {"clients": CLIENTS, "rounds": 2, "compression": "sign", "error_feedback": False}
    votes = common | image | {"name": "signsgd", "strategy": {"name": "signsgd"}, "federation": signs}  # type: ignore[operator]
    made["signsgd"] = Job.parse(votes, origin="test")
    filtered = {"federation": {"clients": CLIENTS, "cohort": 2, "rounds": 4, "quorum": 1.0}}
    made["flanders"] = Job.parse(
        image | filtered | {"seed": 21, "name": "flanders", "strategy": {"name": "flanders"}}, origin="test"
    )
    made |= correcting(common, image, text)
    small = made["views-fedadam"]
    travels = small.federation.model_copy(update={"compression": "int8"})
    made["small"] = small.model_copy(update={"name": "small", "federation": travels})
    texts = made["news-fedadam"]
    travels = texts.federation.model_copy(update={"compression": "int4"})
    made["remembering"] = texts.model_copy(update={"name": "remembering", "federation": travels})
    later = [{"method": "last-k", "layers": 1, "after": 1}, {"method": "full", "after": 1, "lr": 0.001}]
    grown = common | image | {"name": "grown", "tune": {"method": "head", "then": later}}
    made["grown"] = Job.parse(grown | {"federation": common["federation"] | {"rounds": 3}}, origin="test")  # type: ignore[operator]
    own = common | text | {"data": text["data"] | {"validation_fraction": 0.3}}  # type: ignore[operator]
    tables = {
        "own-heads": {"personal": {"keep": "head"}, "federation": {"clients": CLIENTS, "rounds": 2}},
        "mixture": {
            "personal": {"keep": "mixture"},
            "tune": {"head_init": "ridge"},
            "federation": {"clients": CLIENTS, "rounds": 3},  # the first forms a head of sums
        },
    }
    few = {"method": "seeds", "seeds": 64}
    tables["seeds"] = {"tune": few, "train": {"lr": 0.001, "batch_size": 8, "steps": 5}}
    tables["moon"] = {"tune": {"method": "last-k", "layers": 1}, "strategy": {"name": "moon"}}
    kept = {"tune": {"method": "last-k", "layers": 1}, "train": text["train"] | {"cached_states": "fp32"}}  # type: ignore[operator]
    tables["kept-states"] = kept
    beside = image["train"] | {"cached_states": "bf16"}  # type: ignore[operator]
    pictures = common | image | {"name": "kept-pictures", "tune": kept["tune"], "train": beside}  # type: ignore[operator]
    made["kept-pictures"] = Job.parse(pictures, origin="test")
    tables["random-features"] = {
        "tune": {"head_init": "ridge", "hidden": 24},
        "federation": {"clients": CLIENTS, "rounds": 2},
    }
    merges = ("rolora", "fedex", "flora", "flexlora", "fedsb")
    tables |= {how: {"tune": {"method": "lora", "rank": 2, "lora_merge": how}} for how in merges}
    made |= {name: Job.parse(own | table | {"name": name}, origin="test") for name, table in tables.items()}
    whole = text | {"tune": {"method": "full"}}
    taught = {"teacher": str(folder / "teacher"), "teacher_weight": 0.8}
    for table in (
        whole | {"name": "taught", "train": text["train"] | taught},  # type: ignore[operator]
        whole | {"name": "pruned", "backbone": text["backbone"] | {"prune": 0.5}},  # type: ignore[operator]
    ):
        made[f"{table['name']}-fedavg"] = Job.parse(common | table, origin="test")
    return made


def correcting(common: dict[str, Any], image: dict[str, Any], text: dict[str, Any]) -> dict[str, Job]:
    """Jobs whose clients remember what to correct their steps by: heads, and a network's factors."""
    more = common | {"federation": {"clients": CLIENTS, "cohort": 2, "rounds": 4}}
    tables = {
        "scaffold": image | {"strategy": {"name": "scaffold", "options": {"option": 1}}},
        "scaffold-texts": text | {"strategy": {"name": "scaffold"}},
        "feddyn": image | {"strategy": {"name": "feddyn"}},
    }
    return {name: Job.parse(more | table | {"name": name}, origin="test") for name, table in tables.items()}


@dataclass
class Places:
    """The jobs, what they give in process, and a running server that sites can join."""

    folder: Path
    jobs: dict[str, Job]
    federation: Federation
    known: dict[str, RunResult] = field(default_factory=dict)

    def expected(self, name: str) -> RunResult:
        """The result of the simulation."""
        if name not in self.known:
            out = self.folder / f"sim-{name}"
            self.known[name] = simulate(self.jobs[name], out, on_event=ignore_events, report=False)
        return self.known[name]

    @contextmanager
    def sites(self, name: str, order: Sequence[int]) -> Iterator[None]:
        """All clients of a job as real sites, started in the given order."""
        shards = self.folder / f"shards-{name}"
        if not shards.exists():
            write_shards(self.jobs[name], shards)
        with self.joined(shards, [f"client-{number:04d}" for number in order]):
            yield

    @contextmanager
    def joined(self, shards: Path, names: Sequence[str]) -> Iterator[None]:
        """Sites of these names with their shards, each with a cache of its own."""
        try:
            for name in names:
                cache = {"ATOLL_CACHE": str(self.folder / f"cache-{name}")}
                self.federation.join(name, shards / name, env=cache)
            self.federation.wait_online(*names)
            yield
        finally:
            for name in names:
                self.federation.running[name].process.terminate()
            self.federation.wait_alone()

    def agreed(self, name: str) -> dict[str, Any]:
        """The result of a job at the sites that are there, which is the simulation's."""
        result, expected = self.federation.run(self.jobs[name]), self.expected(name)
        assert result["engine"] == "flower"
        assert result["model_sha256"] == expected.model_sha256, name
        assert result["final"]["clients"] == expected.final["clients"]
        assert set(result["final"]["clients"]) == set(client_names(CLIENTS))
        assert result["personal"] == expected.personal
        assert all(not line["set_aside"] for line in result["rounds"])
        return result

    def memories(self, client: str) -> set[Path]:
        """What a client keeps from round to round, each file for its owner alone."""
        kept = set((self.federation.kits[client] / "state" / "memory").rglob("*.safetensors"))
        assert all(path.stat().st_mode & 0o077 == 0 for path in kept)
        return kept


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    made = jobs(folder)
    with federation_of(folder, *client_names(CLIENTS)) as federation:
        yield Places(folder, made, federation)


def test_images_at_real_sites_that_compress_views_give_the_bits_of_the_simulation(places: Places) -> None:
    names = client_names(CLIENTS)
    with places.sites("digits-fedavg", [2, 0, 1]):
        before = {name: places.memories(name) for name in names}
        small = places.agreed("small")
        kept = {name: places.memories(name) - before[name] for name in names}
    assert small["model_sha256"] != places.expected("views-fedadam").model_sha256
    assert small["bytes_up"] < small["bytes_down"] / 3.9
    for name in names:
        trained = [line["round"] for line in small["rounds"] if name in line["cohort"]]
        found = sorted(path.name for path in kept[name])
        assert found == [f"round-{round:06d}.safetensors" for round in trained]


def test_texts_at_real_sites_that_keep_send_sums_or_fold_factors_give_the_bits_of_the_simulation(
    places: Places,
) -> None:
    """Jobs on the same shards take turns at the same sites, which joined in some order."""
    with places.sites("news-fedadam", [1, 2, 0]):
        places.agreed("news-fedadam")
        before = {name: places.memories(name) for name in client_names(CLIENTS)}
        places.agreed("mixture")
        for name, known in before.items():
            assert len(places.memories(name) - known) == 2  # two rounds of training
        places.agreed("flora")


@pytest.mark.matrix
def test_images_at_real_sites_that_tune_ever_more_give_the_bits_of_the_simulation(places: Places) -> None:
    with places.sites("digits-fedavg", [2, 0, 1]):
        grown = places.agreed("grown")
    assert [line["tuning"] for line in grown["rounds"]] == ["head", "last-k with layers = 1", "full"]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("names", "order"),
    [
        (
            [
                "digits-fedavg",
                "digits-fedadam",
                "views-fedavg",
                "views-fedadam",
                "fednova",
                "scaffold",
                "feddyn",
                "qffl",
                "afl",
                "flanders",
                "ifca",
                "pfedme",
                "by-size",
                "power-of-choice",
                "oort",
                "fedbuff",
                "fedcompass",
                "signsgd",
                "kept-pictures",
            ],
            [0, 1, 2],
        ),
        (
            [
                "news-fedavg",
                "own-heads",
                "scaffold-texts",
                "rolora",
                "fedex",
                "flexlora",
                "fedsb",
                "random-features",
                "kept-states",
                "moon",
                "seeds",
            ],
            [2, 1, 0],
        ),
        (["varied-fedavg", "compiled-fedavg", "varied-fedadam", "compiled-fedadam"], [0, 2, 1]),
    ],
)
def test_real_sites_that_join_in_any_order_give_the_bits_of_the_simulation(
    places: Places, names: list[str], order: list[int]
) -> None:
    with places.sites(names[0], order):
        for name in names:
            places.agreed(name)


@pytest.mark.matrix
def test_real_sites_with_a_teacher_or_a_pruned_backbone_give_the_bits_of_the_simulation(
    places: Places,
) -> None:
    simulate(places.jobs["news-fedavg"], places.folder / "teacher", on_event=ignore_events, report=False)
    with places.sites("news-fedavg", [1, 0, 2]):
        for name in ("taught-fedavg", "pruned-fedavg"):
            result, plain = places.agreed(name), places.expected("news-fedavg")
            assert result["model_sha256"] != plain.model_sha256


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("task", "methods"), [(task, tuple(m for m in METHODS if (task, m) in WORKING)) for task in TABLES]
)
def test_every_task_and_way_of_tuning_gives_the_bits_of_the_simulation_on_two_real_sites(
    places: Places, task: str, methods: tuple[str, ...], tmp_path: Path
) -> None:
    """All ways of tuning take turns at the same two sites."""
    agree(places, [ready(job_of(task, method), tmp_path) for method in methods], tmp_path)


@pytest.mark.matrix
def test_a_detector_that_draws_draws_at_real_sites_what_it_draws_in_simulation(
    places: Places, tmp_path: Path
) -> None:
    agree(places, [ready(job_of("object-detection", "head", backbone=DRAWING), tmp_path)], tmp_path)


def agree(places: Places, jobs: Sequence[Job], folder: Path) -> None:
    """Two sites join with the first job's shards; every job ends there with the bits of the simulation."""
    with places.joined(folder / "shards", write_shards(jobs[0], folder / "shards")):
        for job in jobs:
            result = places.federation.run(job)
            expected = simulate(job, folder / job.name, on_event=ignore_events, report=False)
            assert result["model_sha256"] == expected.model_sha256, job.name
            assert result["final"]["clients"].keys() == expected.final["clients"].keys()


@pytest.mark.parametrize(
    "name",
    [
        "remembering",
        "digits-fedavg",
        "views-fedadam",
        "varied-fedavg",
        pytest.param("scaffold", marks=pytest.mark.matrix),
        pytest.param("scaffold-texts", marks=pytest.mark.matrix),
        pytest.param("feddyn", marks=pytest.mark.matrix),
    ],
)
def test_ray_gives_the_bits_of_the_simulation(places: Places, name: str) -> None:
    result = simulate(
        places.jobs[name],
        places.folder / f"ray-{name}",
        engine="ray",
        workers=2,
        on_event=ignore_events,
        report=False,
    )
    assert result.model_sha256 == places.expected(name).model_sha256
    assert result.engine == "ray"


@pytest.mark.parametrize(
    "name", ["digits-fedavg", "news-fedadam", pytest.param("scaffold-texts", marks=pytest.mark.matrix)]
)
def test_a_run_killed_and_resumed_by_four_workers_gives_the_same_bits(places: Places, name: str) -> None:
    job, out = places.folder / f"{name}.toml", places.folder / f"killed-{name}"
    job.write_text(job_toml(places.jobs[name]))
    kill_after(1, 2, 0, job, out)
    again = ("simulate", str(job), "--out", str(out), "--resume", "--workers", "4")
    resumed = atoll(places.folder / f"{name}.log", *again)
    assert resumed.ends() == 0, resumed.text()
    assert result_of(out)["model_sha256"] == places.expected(name).model_sha256
