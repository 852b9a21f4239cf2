"""FedBuff and FedAsync: their algorithms in NumPy, the virtual clock, crashes, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.errors import ConfigError
from atoll.privacy.accounting import Release
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import Failure, Reply, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import Request, TrainRequest
from atoll.server.rounds.asynchronous import ahead
from atoll.server.rounds.asynchronous.ahead import AskedAhead
from atoll.server.run.checkpoint import latest
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import books_in
from atoll.sim.population.population import Population
from atoll.strategies.asynchronous.fedasync import FedAsync
from atoll.strategies.asynchronous.late import staleness_weight
from tests.client.state.test_client_state import Array, Softmax, final, heads
from tests.sim.test_simulation import Breaks, run

FEDBUFF = {"cohort": 2, "concurrency": 4, "rounds": 9}
FEDASYNC = {"cohort": 1, "concurrency": 3, "rounds": 9}


class Trained(Softmax):
    """A head in NumPy whose clients take SGD's steps, held near where they started by `mu`."""

    def trained(self, start: Array, client: str, round: int, lr: float, mu: float = 0.0) -> Array:
        w = start
        for rows in self.batches(client, round):
            w = w - lr * (self.gradient(w, client, rows) + mu * (w - start))
        return w


@dataclass
class Events:
    """The papers' server as a loop over events: who is at work, since which version, until when."""

    seed: int
    names: Sequence[str]
    concurrency: int
    now: float = 0.0
    at_work: dict[str, tuple[int, float]] = field(default_factory=dict)

    def fill(self, version: int) -> None:
        """Idle clients take the free places: as many as there are, drawn as cohorts are."""
        idle = sorted(set(self.names) - set(self.at_work))
        free = self.concurrency - len(self.at_work)
        order, generator = list(range(len(idle))), stream(self.seed, "cohort", version + 1)
        if free < len(idle):  # Floyd's algorithm
            uniform = torch.rand(free, generator=generator, dtype=torch.float64).tolist()
            order = []
            for last, u in zip(range(len(idle) - free, len(idle)), uniform, strict=True):
                place = int(u * (last + 1))
                order.append(last if place in order else place)
        for client in (idle[place] for place in order):
            generator = stream(self.seed, "flight", client, version + 1)
            seconds = abs(float(torch.randn(1, generator=generator, dtype=torch.float64)))
            self.at_work[client] = (version, self.now + seconds)

    def next(self) -> tuple[str, int]:
        """The client that is done first, and its version."""
        client = min(self.at_work, key=lambda name: (self.at_work[name][1], name))
        version, self.now = self.at_work.pop(client)
        return client, version


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fedbuff_is_algorithm_1_of_its_paper(tmp_path: Path, momentum: float) -> None:
    """Nguyen et al. 2022, a buffer of two among four of six clients that work at a time."""
    section = {"name": "fedbuff", "lr": 0.7, "momentum": momentum}
    setting = heads(section, federation=FEDBUFF)
    result = run(setting, tmp_path)
    problem, events = Trained(setting), Events(setting.seed, Trained(setting).names, 4)
    versions, velocity = [problem.start], np.zeros_like(problem.start)
    for line in result.rounds:
        events.fill(len(versions) - 1)
        buffer, staleness = np.zeros_like(velocity), []
        came = [events.next() for _ in range(2)]
        for client, version in came:
            delta = problem.trained(versions[version], client, version + 1, 0.5) - versions[version]
            staleness.append(len(versions) - 1 - version)
            buffer += delta / np.sqrt(1 + staleness[-1])
        velocity = momentum * velocity + buffer / 2
        versions.append(versions[-1] + 0.7 * velocity)
        assert line["cohort"] == sorted(client for client, _ in came)
        assert line["staleness"] == {"mean": sum(staleness) / 2, "max": max(staleness)}
    np.testing.assert_allclose(final(tmp_path, "model/"), versions[-1], rtol=0, atol=1e-6)
    assert max(line["staleness"]["max"] for line in result.rounds) > 1


@pytest.mark.parametrize(("weighing", "a", "b"), [("constant", 0.5, 4.0), ("hinge", 2.0, 1.0)])
def test_fedasync_is_algorithm_1_of_its_paper(tmp_path: Path, weighing: str, a: float, b: float) -> None:
    """Xie et al. 2019: whole models are mixed, each as it comes."""
    options = {"weighing": weighing, "a": a, "b": b}
    section = {"name": "fedasync", "lr": 0.6, "proximal_mu": 0.3, "options": options}
    setting = heads(section, federation=FEDASYNC)
    result = run(setting, tmp_path)
    problem, events = Trained(setting), Events(setting.seed, Trained(setting).names, 3)
    versions, late = [problem.start], []
    for line in result.rounds:
        events.fill(len(versions) - 1)
        client, version = events.next()
        late.append(len(versions) - 1 - version)
        x_new = problem.trained(versions[version], client, version + 1, 0.5, mu=0.3)
        s = 1.0 if weighing == "constant" or late[-1] <= b else 1 / (a * (late[-1] - b) + 1)
        versions.append((1 - 0.6 * s) * versions[-1] + 0.6 * s * x_new)
        assert line["cohort"] == [client]
    np.testing.assert_allclose(final(tmp_path, "model/"), versions[-1], rtol=0, atol=1e-6)
    assert max(late) > b or weighing == "constant"


@pytest.mark.parametrize("weighing", ["constant", "polynomial", "hinge"])
def test_a_weight_is_1_for_what_is_fresh_and_never_grows(weighing: Any) -> None:
    weights = [staleness_weight(weighing, late, 0.5, 4) for late in range(20)]
    assert weights[0] == 1.0 and all(0 < after <= before for before, after in pairwise(weights))


def test_a_late_client_pulls_back_towards_where_it_started() -> None:
    delta, drift = {"w": torch.tensor([1.0])}, {"w": torch.tensor([-3.0], dtype=torch.float64)}
    late = FedAsync(weighing="polynomial", a=0.5).late(delta, drift, 3)
    assert late["w"].dtype == torch.float32 and late["w"].tolist() == [-1.0]


@pytest.mark.parametrize(
    ("section", "federation"),
    [
        ({"name": "fedbuff", "momentum": 0.5, "lr_schedule": "cosine"}, FEDBUFF),
        ({"name": "fedasync"}, FEDASYNC),
    ],
)
def test_every_engine_and_a_resumed_run_give_the_same_bits(
    tmp_path: Path, section: dict[str, Any], federation: dict[str, Any]
) -> None:
    setting = heads(section, federation=federation)
    whole = run(setting, tmp_path / "whole")
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole.model_sha256
    for number, left in enumerate((3, 7)):
        out = tmp_path / f"r{number}"
        population, (_, memory) = Population.of(setting), books_in(out)
        stopped = Breaks.of(population, memory=memory)
        stopped.left = left
        with pytest.raises(KeyboardInterrupt):
            run_job(setting, stopped, out, cached_test_set(population, None))
        resumed = run(setting, out, resume=True)
        assert resumed.model_sha256 == whole.model_sha256
        assert [line["cohort"] for line in resumed.rounds] == [line["cohort"] for line in whole.rounds]


def test_a_checkpoint_keeps_the_models_that_somebody_works_from_and_no_other(tmp_path: Path) -> None:
    setting = heads({"name": "fedbuff"}, federation=FEDBUFF)
    run(setting, tmp_path)
    found = latest(tmp_path / "checkpoints", setting.hash)
    assert found is not None
    starts = {name: value for name, value in found.state.items() if name.startswith("flights.start.")}
    models = {name.split(".")[2] for name in found.state if name.startswith("flights.model.")}
    assert len(starts) == 2 and models == {str(int(float(start))) for start in starts.values()}


def test_devices_say_who_is_late_and_how_long_it_took(tmp_path: Path) -> None:
    """One client takes ten times as long as the others, whose rounds go on meanwhile."""
    names = [f"client-{number:04d}" for number in range(6)]
    rows = [f"{name},{1 if name == 'client-0002' else 10}" for name in names]
    (tmp_path / "devices.csv").write_text("\n".join(["client,examples_per_second", *rows]))
    federation = {"cohort": 1, "concurrency": 6, "rounds": 12, "devices": str(tmp_path / "devices.csv")}
    data = {"source": "digits", "validation_fraction": 0}
    setting = heads({"name": "fedbuff"}, federation=federation, data=data)
    result = run(setting, tmp_path / "r")
    problem = Trained(setting)
    takes = {name: 2 * len(problem.data[name][1]) / (1 if name == "client-0002" else 10) for name in names}
    ends, free, now, expected = {name: takes[name] for name in names}, "", 0.0, []
    for _ in result.rounds:
        if free:
            ends[free] = now + takes[free]
        free = min(ends, key=lambda name: (ends[name], name))
        now = max(now, ends.pop(free))
        expected.append((free, now))
    found = [(line["cohort"][0], line["simulated"]["elapsed"]) for line in result.rounds]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [end for _, end in found] == pytest.approx([end for _, end in expected])
    assert [name for name, _ in found].count("client-0002") <= 1


def test_a_client_that_fails_frees_its_place(tmp_path: Path) -> None:
    class Fails(InlineTransport):
        def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
            for reply in super().send_and_receive(request, names, timeout):
                lost = isinstance(request, TrainRequest) and reply.client == "client-0003"
                yield Failure(reply.client, "out of memory") if lost else reply

    setting = heads({"name": "fedbuff"}, federation={**FEDBUFF, "rounds": 25, "quorum": 0.5})
    population = Population.of(setting)
    result = run_job(setting, Fails.of(population), tmp_path, cached_test_set(population, None))
    fails = [line for line in result.rounds if "client-0003" in line["cohort"]]
    assert len(fails) > 1 and all(line["set_aside"] == {"client-0003": "out of memory"} for line in fails)
    assert len(result.rounds) == 25 and all(line["trained"] == 1 for line in fails)


def test_what_is_clipped_has_been_weighed_before(tmp_path: Path) -> None:
    """Under client-level privacy a client moves the mean by the clipping norm over K at most, late or not."""
    privacy = {
        "unit": "client",
        "noise_multiplier": 1e-6,
        "delta": 1e-3,
        "clipping_norm": 1e-3,
        "seeded_noise": True,
    }
    models, lines = [], []
    for rounds in (3, 4, 5, 6):
        federation = {**FEDBUFF, "rounds": rounds}
        setting = heads({"name": "fedbuff"}, federation=federation, privacy=privacy)
        lines = run(setting, tmp_path / str(rounds)).rounds
        models.append(final(tmp_path / str(rounds), "model/"))
    steps = [float(np.linalg.norm(after - before)) for before, after in pairwise(models)]
    assert max(steps) <= 1e-3 * (1 + 1e-4) and min(steps) > 1e-4
    assert any(line["staleness"]["max"] for line in lines)


def test_a_buffer_is_charged_as_if_everybody_were_in_it() -> None:
    """Who is at work follows from who was, so that nothing amplifies."""
    privacy = {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-3}
    setting = heads({"name": "fedbuff"}, federation=FEDBUFF, privacy=privacy)
    plan = dp_plan_of(setting, "client")
    assert plan is not None
    assert plan.divisor == 2 and plan.releases == 9 and plan.event == Release(2.0, 1.0)


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"strategy": {"name": "fedavg"}}, r"strategy\.name: federation\.concurrency .* found 'fedavg'"),
        ({"federation": {"cohort": 2}}, r"federation\.concurrency: missing; fedbuff needs to know"),
        (
            {"federation": {"cohort": None, "concurrency": 4}},
            r"federation\.cohort: with fedbuff it is the buffer's size",
        ),
        ({"federation": {"cohort": 4, "concurrency": 3}}, r"expected from federation\.cohort = 4 to"),
        ({"federation": {"cohort": 4, "concurrency": 7}}, r"federation\.clients = 6, found 7"),
        ({"strategy": {"name": "fedasync"}}, r"federation\.cohort: with fedasync it is 1"),
        ({"federation": {**FEDBUFF, "secure_aggregation": True}}, "secure_aggregation: .* at the same time"),
        ({"federation": {**FEDBUFF, "weights": "equal"}}, r"federation\.weights: fedbuff has a rule"),
        ({"federation": {**FEDBUFF, "compression": "int8"}}, r"federation\.error_feedback: "),
        ({"personal": {"keep": "head"}}, r"personal\.keep: "),
        ({"strategy": {"name": "fedavg"}, "federation": {"order": "arrival"}}, r"federation\.order has no"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tables: dict[str, Any], told: str) -> None:
    usual = {"strategy": {"name": "fedbuff"}, "federation": FEDBUFF} | tables
    federation = {"rounds": 3} | usual.pop("federation")
    with pytest.raises(ConfigError, match=told):
        heads(usual.pop("strategy"), federation=federation, **usual)


def test_updates_may_be_compressed_where_nothing_is_fed_back(tmp_path: Path) -> None:
    federation = {**FEDBUFF, "compression": "int8", "error_feedback": False}
    setting = heads({"name": "fedbuff"}, federation=federation)
    assert run(setting, tmp_path).rounds[-1]["set_aside"] == {}


@dataclass
class Scripted:
    """Sites whose replies come at given looks; None in the script is a client that never replies."""

    script: dict[str, int | None]
    looks: int = 0
    asked: list[list[str]] = field(default_factory=list)
    deadline: int = 50

    def ask_ahead(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply | None]:
        self.asked.append(list(names))
        left, began = set(names), self.looks
        while left and self.looks < began + self.deadline:
            here = sorted(n for n in left if (due := self.script[n]) is not None and due <= self.looks)
            for name in here:
                left.discard(name)
                yield Update(name, 1, {}, 1)
                yield Update(name, 1, {}, 2)  # again, which is not read
            yield None


REQUEST: Any = object()
"""Which nobody reads."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[AskedAhead, Scripted]:
    """Clients a to e, whose looks are what passes in place of time."""
    site = Scripted({"a": 9, "b": 2, "c": 5, "d": 2, "e": None})

    def passes(seconds: float) -> None:
        site.looks += 1

    monkeypatch.setattr(ahead.time, "sleep", passes)
    return AskedAhead(site, 60.0), site


def test_nobody_waits_for_a_slow_member_of_its_group(asked: tuple[AskedAhead, Scripted]) -> None:
    outstanding, site = asked
    outstanding.ask(REQUEST, ["a", "b", "c"])
    outstanding.ask(REQUEST, ["d"])
    assert [reply.client for reply in outstanding.take(["b", "d"])] == ["b", "d"] and site.looks == 2
    assert outstanding.has_asked("a") and not outstanding.has_asked("b")
    assert [reply.client for reply in outstanding.take(["a"])] == ["a"] and site.looks == 9
    assert [reply.client for reply in outstanding.take(["c"])] == ["c"] and outstanding.under_way == []


def test_by_arrival_the_first_count(asked: tuple[AskedAhead, Scripted]) -> None:
    outstanding, site = asked
    outstanding.ask(REQUEST, ["a", "c", "d"])
    assert outstanding.first(2) == ["c", "d"] and site.looks == 5
    assert outstanding.first(9) == ["a", "c", "d"]


def test_who_never_replies_is_done_at_the_deadline(asked: tuple[AskedAhead, Scripted]) -> None:
    outstanding, site = asked
    outstanding.ask(REQUEST, ["e"])
    assert outstanding.take(["e"]) == [] and site.looks == site.deadline
    outstanding.ask(REQUEST, ["e"])
    outstanding.close()
    assert outstanding.under_way == []
