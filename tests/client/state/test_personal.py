"""Models of clients' own: what is kept stays, the rest is merged, and everywhere with the same bits."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_sgd import train_model
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.requests import Request, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.simulated_site import IndexedClients, PopulationIndex
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from atoll.trained import trained
from tests.sim.test_simulation import job, run

BERT: dict[str, Any] = {}
KEEPS = ("head", "norms", "mixture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.backbones.test_backbones import tiny_bert
    from tests.federation.news import news_file

    made = tmp_path_factory.mktemp("texts")
    news_file(made / "news.csv")
    tiny_bert(made / "bert")
    return made


def texts(folder: Path, keep: str | None, **tables: Any) -> Job:
    """Clients with few classes each, and a small encoder of texts that is tuned."""
    table: dict[str, Any] = {
        "name": "news",
        "seed": 21,
        "task": {"name": "text-classification"},
        "data": {
            "source": str(folder / "news.csv"),
            "partition": {"kind": "dirichlet", "alpha": 0.3},
            "validation_fraction": 0.3,
        },
        "backbone": {"name": str(folder / "bert"), "max_tokens": 16},
        "tune": {"method": "last-k", "layers": 1},
        "train": {"lr": 0.05, "batch_size": 8},
        "federation": {"clients": 4, "cohort": 3, "rounds": 3},
        "personal": {} if keep is None else {"keep": keep},
    }
    return Job.parse(table | {k: table.get(k, {}) | v for k, v in tables.items()}, origin="test")


def hashes(result: RunResult) -> list[str]:
    return [line["model_sha256"] for line in result.rounds]


class Runs(dict[str, RunResult]):
    """The run with each way of keeping, played when a test first asks for it."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    def __missing__(self, keep: str) -> RunResult:
        self[keep] = run(texts(self.folder, keep), self.out / keep)
        return self[keep]


@pytest.fixture(scope="module")
def references(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(folder, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("keep", KEEPS)
def test_own_models_are_the_same_bits_one_client_at_a_time(
    tmp_path: Path, folder: Path, references: Runs, keep: str
) -> None:
    loop = run(texts(folder, keep), tmp_path / "r", engine="loop")
    assert hashes(loop) == hashes(references[keep])
    assert loop.final == references[keep].final and loop.personal == references[keep].personal


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.processes
def test_own_models_are_the_same_bits_in_worker_processes(
    tmp_path: Path, folder: Path, references: Runs, keep: str
) -> None:
    """A client's own part is reached from whichever process trains it."""
    pooled = run(texts(folder, keep), tmp_path / "r", workers=2)
    assert hashes(pooled) == hashes(references[keep])
    assert pooled.final == references[keep].final


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["head", "mixture"])
@pytest.mark.processes
def test_own_models_are_the_same_bits_on_ray(
    tmp_path: Path, folder: Path, references: Runs, keep: str
) -> None:
    ray = run(texts(folder, keep), tmp_path / "r", engine="ray", workers=2)
    assert hashes(ray) == hashes(references[keep])
    assert ray.final == references[keep].final


class Stopped(Exception): ...


class Stops(InlineTransport):
    """Breaks off in round 3, when clients have trained and the server has not merged yet."""

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Any:
        replies = list(super().send_and_receive(request, names, timeout))
        if isinstance(request, TrainRequest) and request.round == 3:
            raise Stopped
        return replies


def stopped_and_resumed(setting: Job, out: Path) -> RunResult:
    population = Population.of(setting)
    with pytest.raises(Stopped):
        run_job(
            setting,
            Stops.of(population, memory=ClientStateStore(out / "memory", of_one_run=True)),
            out,
            cached_test_set(population, None),
        )
    return run(setting, out, resume=True)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_run_stopped_between_memory_and_checkpoint_resumes_to_the_same_bits(
    tmp_path: Path, folder: Path, references: Runs, keep: str
) -> None:
    again = stopped_and_resumed(texts(folder, keep), tmp_path / "r")
    assert hashes(again) == hashes(references[keep])
    assert again.final == references[keep].final


@pytest.mark.parametrize("keep", ["head", "norms"])
def test_what_clients_keep_never_travels_and_differs_between_them(
    tmp_path: Path, folder: Path, keep: str
) -> None:
    setting = texts(folder, keep)
    sent: list[set[str]] = []

    class Watched(InlineTransport):
        def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Any:
            replies = list(super().send_and_receive(request, names, timeout))
            sent.append(set(request.tensors))
            sent.extend(set(reply.delta) for reply in replies if isinstance(request, TrainRequest))
            return replies

    population, memory = Population.of(setting), ClientStateStore()
    run_job(
        setting,
        Watched.of(population, memory=memory),
        tmp_path / "r",
        cached_test_set(population, None),
    )
    own = {"head": {"head.weight", "head.bias"}}.get(keep, set())
    for names in sent:
        assert names == sent[0] and not names & own
        assert keep != "norms" or not any("LayerNorm" in name for name in names)
    [held] = {run for run, _ in memory._held}
    states = [memory.load_before(held, f"client-000{n}", 99) for n in range(4)]
    assert all(set(state) == set(states[0]) and state for state in states)
    name = next(iter(states[0]))
    assert not any(torch.equal(states[0][name], other[name]) for other in states[1:])


def test_kept_norms_are_fedbn(tmp_path: Path, folder: Path) -> None:
    """Li et al. 2021, algorithm 1, by hand: each client goes on from its own norms, all else is averaged.

    The paper averages evenly; here a client counts by its examples, as in FedAvg.
    """
    setting = texts(folder, "norms", federation={"clients": 4, "cohort": 4, "rounds": 2})
    run(setting, tmp_path)
    population = Population.of(setting)
    learner = Learner.of(setting, task_named(setting.task.name), population.roster(setting).data_info[0])
    clients = IndexedClients(PopulationIndex(population, learner), population.names(setting))
    start = learner.initial()
    norms = {name for name in start if "LayerNorm" in name}
    models = {client: dict(start) for client in clients.names}
    for round in (1, 2):
        moves = []
        for client, model in models.items():
            shard = clients.train(client)
            update = train_model(learner, model, shard, setting, client=client, round=round, plan={})
            model.update({name: model[name] + update.delta[name] for name in norms})
            moves.append((len(shard), update.delta))
        for name in start.keys() - norms:
            mean = sum(n * d[name].double() for n, d in moves) / sum(n for n, _ in moves)
            shared = models["client-0000"][name] + mean
            for model in models.values():
                model[name] = shared.float()
    _, found = trained(tmp_path)
    memory = ClientStateStore(tmp_path / "memory", of_one_run=True)
    for client, model in models.items():
        own = memory.load_before("", client, 99)
        assert {name.removeprefix("own/") for name in own} == norms
        for name, expected in model.items():
            kept = own[f"own/{name}"] if name in norms else found[name]
            torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)


def test_a_single_client_with_its_own_head_trains_as_without(tmp_path: Path, folder: Path) -> None:
    """FedPer with one client is plain training, but for the rounding of a head that isn't merged."""
    alone = {"federation": {"clients": 1, "cohort": 1, "rounds": 3}}
    plain = run(texts(folder, None, **alone), tmp_path / "plain")
    own = run(texts(folder, "head", **alone), tmp_path / "own")
    found = {
        name: json.loads((tmp_path / name / "result.json").read_text())["final"]["clients"]
        for name in ("plain", "own")
    }
    [a], [b] = found["plain"].values(), found["own"].values()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["accuracy"] == b["accuracy"]
    for one, other in zip(plain.rounds, own.rounds, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_shared_model_of_a_mixture_is_the_plain_runs_bit_for_bit(
    tmp_path: Path, folder: Path, references: Runs
) -> None:
    plain = run(texts(folder, None), tmp_path / "r")
    mixture = references["mixture"]
    assert hashes(mixture) == hashes(plain)
    assert mixture.final["server"] == plain.final["server"]
    assert mixture.personal["global_clients"] == plain.final["clients"]
    assert mixture.final["clients"] != plain.final["clients"]


MIXED: dict[str, Any] = {"personal": {"keep": "mixture", "pull": 0.5}}


def test_mixtures_of_heads_are_the_same_bits_at_once_and_one_by_one(tmp_path: Path) -> None:
    setting = job(**MIXED)
    inline, plain = run(setting, tmp_path / "a"), run(job(), tmp_path / "plain")
    for name, options in {"loop": {"engine": "loop"}, "workers": {"workers": 3}}.items():
        other = run(setting, tmp_path / name, **options)
        assert hashes(inline) == hashes(other) == hashes(plain), name
        assert inline.final == other.final, name


def test_mixtures_of_heads_resume_to_the_same_bits_also_where_updates_are_compressed(tmp_path: Path) -> None:
    setting = job(**MIXED, federation={"compression": "int4"})
    whole = run(setting, tmp_path / "whole")
    again = stopped_and_resumed(setting, tmp_path / "r")
    assert hashes(again) == hashes(whole) and again.final == whole.final
    assert hashes(whole) == hashes(run(job(federation={"compression": "int4"}), tmp_path / "plain"))


def digits(**tables: Any) -> tuple[Learner, Population]:
    setting = job(**tables)
    population = Population.of(setting)
    return Learner.of(
        setting, task_named(setting.task.name), population.roster(setting).data_info[0]
    ), population


def test_a_head_that_starts_elsewhere_moves_as_autograd_does_held_to_the_shared_one() -> None:
    """Ditto's own model, against the loop that is written out with torch's autograd and optimizer."""
    learner, population = digits(train={"epochs": 2})
    index = PopulationIndex(population, learner)
    examples, client_rows = index.client_rows(["client-0000", "client-0001", "client-0002"])
    shared = learner.initial()
    draw = torch.Generator().manual_seed(1)
    starts: dict[str, Tensors] = {
        w.client: {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in shared.items()}
        for w in client_rows
    }
    local = HeadTrainingConfig(learner.job, LOSSES["softmax"], 1, proximal_mu=0.5, starts=starts)
    found = {u.client: u for u in train_heads(shared, examples, client_rows, local)}
    alone = train_heads(shared, examples, client_rows[1:2], local)[0]
    for work in client_rows:
        shard = index.full_population.select(work.rows.tolist())
        x, y = learner.features.plain(shard), shard.table
        weight, bias = (starts[work.client][f"head.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
        from atoll.client.training.batches import batches

        optimizer = torch.optim.SGD([weight, bias], lr=learner.job.train.lr)
        for rows in batches(len(shard), learner.job, 1, work.client):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x[rows] @ weight.T + bias, y[rows])
            apart = (weight - shared["head.weight"]).square().sum()
            apart = apart + (bias - shared["head.bias"]).square().sum()
            (loss + 0.25 * apart).backward()
            optimizer.step()
        delta = found[work.client].delta
        assert torch.allclose(shared["head.weight"] + delta["head.weight"], weight, atol=1e-5)
        assert torch.allclose(shared["head.bias"] + delta["head.bias"], bias, atol=1e-5)
    assert all(torch.equal(alone.delta[n], found[client_rows[1].client].delta[n]) for n in shared)


def test_a_strong_pull_holds_a_mixture_to_the_shared_head_and_none_lets_it_go(tmp_path: Path) -> None:
    def gap(pull: float) -> float:
        personal = {"keep": "mixture", "pull": pull}
        setting = job(personal=personal, train={"lr": 0.01}, evaluate={"every": 4})
        population, memory = Population.of(setting), ClientStateStore()
        run_job(
            setting,
            InlineTransport.of(population, memory=memory),
            tmp_path / str(pull),
            cached_test_set(population, None),
        )
        states = [next(iter(held.values())) for held in memory._held.values()]
        shared = trained(tmp_path / str(pull))[1]["head.weight"]
        return sum(float((s["own/head.weight"] - shared).norm()) for s in states)

    assert gap(50.0) < gap(1.0) < gap(0.0)


def test_own_models_gain_where_clients_differ_and_the_result_says_so(tmp_path: Path) -> None:
    classes = tuple("0123456789")
    data = {"partition": {"kind": "pathological", "classes_per_client": 2}, "classes": classes}
    federation = {"clients": 10, "cohort": 10, "rounds": 10}
    setting = job(personal={"keep": "mixture"}, data=data, federation=federation)
    result = simulate(setting, tmp_path / "r", on_event=ignore_events)
    own = result.personal
    assert own["keep"] == "mixture" and own["clients"]["accuracy"] > own["global"]["accuracy"] + 0.05
    values = [c["accuracy"] for c in result.final["clients"].values()]
    assert own["clients"]["accuracy"] == pytest.approx(sum(values) / len(values))
    [note] = [n for n in result.notes if "own model" in n]
    page = html.unescape((tmp_path / "r" / "report.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")
    assert note in page


def test_with_heads_kept_nothing_whole_is_on_disk_and_using_it_is_refused_in_one_line(
    tmp_path: Path, folder: Path
) -> None:
    setting = texts(folder, "head", federation={"rounds": 1})
    result = run(setting, tmp_path / "r")
    assert result.final["server"] == {} and not any(n.startswith("head.") for n in result.trainable)
    assert any("clients keep their heads" in note for note in result.notes)
    with pytest.raises(ConfigError, match="its clients kept their heads, so it holds no whole model"):
        trained(tmp_path / "r")
    run(texts(folder, "norms", federation={"rounds": 1}), tmp_path / "n")
    learner, tensors = trained(tmp_path / "n")
    assert set(tensors) == set(learner.initial())


def test_damaged_or_foreign_memory_ends_the_run_in_one_line(tmp_path: Path) -> None:
    setting = job(**MIXED, federation={"cohort": 6})
    run(setting, tmp_path / "r")
    memory = ClientStateStore(tmp_path / "r" / "memory", of_one_run=True)
    memory.save("", 4, {"client-0001": {"own/head.weight": torch.zeros(3)}})
    population = Population.of(setting)
    carrier = InlineTransport.of(population, memory=memory)
    data_info = population.roster(setting).data_info[0]
    learner = carrier.site.learner(setting, data_info)
    request = TrainRequest(setting.canonical, setting.hash, 5, data_info, learner.initial())
    with pytest.raises(DataError, match="memory of client-0001: is not of this model"):
        list(carrier.send_and_receive(request, ["client-0001"], 1.0))


PRIVATE = {"unit": "client", "epsilon": 1.0, "delta": 1e-4}
OWN_HEAD: dict[str, Any] = {"personal": {"keep": "head"}, "tune": {"method": "lora"}}


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        (
            OWN_HEAD | {"privacy": PRIVATE},
            r"personal\.keep: .* expected 'mixture' or none with privacy\.unit = 'client'",
        ),
        (
            OWN_HEAD | {"privacy": PRIVATE | {"unit": "example", "sampling_rate": 0.1}},
            r"personal\.keep: .* expected 'mixture' or none with privacy\.unit = 'example'",
        ),
        (
            OWN_HEAD | {"federation": {"secure_aggregation": True}},
            "expected 'mixture' or none with federation.secure_aggregation",
        ),
        ({"evaluate": {"patience": 2}}, "expected none with evaluate.patience"),
        ({"personal": {"keep": "head"}}, "'head' would leave nothing to merge with tune.method = 'head'"),
        ({"personal": {"keep": "norms"}}, "'norms' would leave nothing to merge"),
        ({"personal": {"keep": "norms"}, "tune": {"method": "lora"}}, "'norms' are not trained"),
        (
            {"personal": {"keep": "head", "pull": 1.0}},
            "personal.pull has no meaning with keep = 'head', only with 'mixture'",
        ),
    ],
)
def test_where_nothing_can_be_kept_it_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        job(**{"personal": {"keep": "mixture"}} | tables)


def test_a_network_without_norms_and_an_engine_with_one_start_refuse_it(tmp_path: Path, folder: Path) -> None:
    plain = job(personal={"keep": "norms"}, tune={"method": "full"})
    with pytest.raises(ConfigError, match=r"personal\.keep: no norms among what this job tunes"):
        run(plain, tmp_path / "r")
    with pytest.raises(ConfigError, match=r"personal\.keep: engine cohort trains clients from one start"):
        run(texts(folder, "head"), tmp_path / "c", engine="cohort")
