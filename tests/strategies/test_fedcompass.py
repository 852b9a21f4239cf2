"""FedCompass: its scheduler as a loop over events, by hand, in whole runs, and at sites that take time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.policy import Policy
from atoll.client.site import Site
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import ASSIGNED_STEPS, Failure, Reply, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import Request, TrainRequest
from atoll.server.rounds.asynchronous import ahead, grouped_round
from atoll.server.rounds.asynchronous.flights import StepTimes
from atoll.server.rounds.participation import CohortRequest
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import books_in
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.client.state.test_client_state import Array, final, heads
from tests.server.rounds.test_asynchronous import Trained
from tests.sim.test_simulation import DIGITS, Breaks, run
from tests.support.clock import TurnedClock
from tests.support.small import few_pictures

LEAST, MOST, PATIENCE = 20, 100, 1.2


def setting_of(clients: int, rounds: int, strategy: dict[str, Any] | None = None, **tables: Any) -> Job:
    """Heads on digits' pixels, in batches of 16."""
    federation = {"clients": clients, "cohort": None, "concurrency": clients, "rounds": rounds}
    federation |= tables.pop("federation", {})
    section = {"name": "fedcompass"} | (strategy or {})
    train = {"lr": 0.05, "batch_size": 16} | tables.pop("train", {})
    data = {"source": "digits", "validation_fraction": 0} | tables.pop("data", {})
    return heads(section, federation=federation, train=train, data=data, **tables)


@dataclass
class Task:
    """What a client works on."""

    version: int
    steps: int
    begins: float
    group: int


@dataclass(order=True)
class Event:
    """An arrival of a client, or the last moment of a group (which comes after arrivals at that moment)."""

    time: float
    is_timer: bool
    name: str
    group: int = 0


@dataclass
class Compass:
    """The paper's scheduler as a server would run it: timers, waiting updates, no look into the future."""

    seconds: Callable[[str, int, int], float]
    """How long a client takes: (client, version, steps) to seconds."""
    names: Sequence[str]
    version: int = 0
    speed: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    waiting: dict[int, list[str]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.names:
            self._begin(name, 0.0, LEAST, 0)

    def _begin(self, name: str, now: float, steps: int, group: int) -> None:
        self.tasks[name] = Task(self.version, steps, now, group)
        heapq.heappush(self.events, Event(now + self.seconds(name, self.version, steps), False, name))

    def merges(self) -> Iterator[tuple[float, dict[str, Task]]]:
        """(when, what is merged), one after the other."""
        while True:
            event = heapq.heappop(self.events)
            merged = self._at_latest(event) if event.is_timer else self._arrived(event)
            if merged:
                tasks = {name: self.tasks.pop(name) for name in sorted(merged)}
                self.version += 1
                yield event.time, tasks
                for name in sorted(merged, key=lambda name: (self.speed[name], name)):
                    self._assign(name, event.time)

    def _at_latest(self, event: Event) -> list[str]:
        return self.waiting.pop(event.group, [])

    def _arrived(self, event: Event) -> list[str]:
        name, task = event.name, self.tasks[event.name]
        last = (event.time - task.begins) / task.steps
        self.speed[name] = 0.1 * self.speed.get(name, last) + 0.9 * last
        if task.group == 0 or event.time > self.times[task.group][1]:
            return [name]
        self.waiting.setdefault(task.group, []).append(name)
        if set(self.waiting[task.group]) == self._members(task.group):
            return self.waiting.pop(task.group)
        return []

    def _members(self, group: int) -> set[str]:
        return {name for name, task in self.tasks.items() if task.group == group}

    def _assign(self, name: str, now: float) -> None:
        own, best, joined = self.speed[name], -1, 0
        for group, (expected, _) in sorted(self.times.items()):
            steps = math.floor((expected - now) / own + 1e-9)
            if LEAST <= steps <= MOST and steps >= best and self._members(group):
                best, joined = steps, group
        if joined:
            self._begin(name, now, best, joined)
            return
        steps = -1
        for group, (_, latest) in self.times.items():
            if now < latest and self._members(group):
                fastest = min(self.speed[member] for member in self._members(group))
                fits = math.floor((latest + MOST * fastest - now) / own + 1e-9)
                steps = max(steps, fits) if fits <= MOST else steps
        steps = MOST if steps < 0 else max(steps, LEAST)
        number = 1 + max(self.times, default=0)
        self.times[number] = (now + steps * own, now + PATIENCE * steps * own)
        heapq.heappush(self.events, Event(self.times[number][1], True, "", number))
        self._begin(name, now, steps, number)


def drawn_seconds(setting: Job) -> Callable[[str, int, int], float]:
    """|N| seconds a step, which a client keeps, and a factor exp(N / 10) of each start."""

    def normal(*purpose: str | int) -> float:
        generator = stream(setting.seed, *purpose)
        return float(torch.randn(1, generator=generator, dtype=torch.float64))

    return lambda name, version, steps: (
        steps * abs(normal("step", name)) * math.exp(normal("step", name, version + 1) / 10)
    )


class TrainedFor(Trained):
    """Clients in NumPy that take the steps that they are told."""

    def delta(self, start: Array, client: str, task: Task) -> Array:
        train = self.setting.train.model_copy(update={"steps": task.steps})
        whole, self.setting = self.setting, self.setting.model_copy(update={"train": train})
        moved = self.trained(start, client, task.version + 1, 0.05) - start
        self.setting = whole
        return moved


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_is_a_loop_over_its_papers_events(tmp_path: Path, seed: int) -> None:
    setting = setting_of(5, 14, {"lr": 0.8}, seed=seed)
    result = run(setting, tmp_path)
    problem = TrainedFor(setting)
    merges = Compass(drawn_seconds(setting), problem.names).merges()
    versions, sizes = [problem.start], []
    for line, (_, tasks) in zip(result.rounds, merges, strict=False):
        assert line["assigned_steps"] == {name: task.steps for name, task in tasks.items()}
        assert line["cohort"] == sorted(tasks)
        late = [len(versions) - 1 - task.version for task in tasks.values()]
        assert line["staleness"] == {"mean": sum(late) / len(late), "max": max(late)}
        deltas = [problem.delta(versions[task.version], name, task) for name, task in tasks.items()]
        summed = sum(delta / np.sqrt(1 + d) for delta, d in zip(deltas, late, strict=True))
        versions.append(versions[-1] + 0.8 / 5 * summed)
        sizes.append(len(tasks))
    assert len(versions) == 15 and max(sizes) > 1
    np.testing.assert_allclose(final(tmp_path, "model/"), versions[-1], rtol=0, atol=1e-6)


BY_HAND = [  # seconds a step: 1, 2 and 5
    (20, {"client-0000": 20}),  # opens group 1: 100 steps, expected at 120, at latest at 140
    (40, {"client-0001": 20}),  # joins it: (120 - 40) / 2 = 40 steps
    (
        100,
        {"client-0002": 20},
    ),  # can't: 20 / 5 = 4. Opens 2: (140 + 100 - 100) / 5 = 28, so 240, at latest 268
    (
        120,
        {"client-0000": 100, "client-0001": 40},
    ),  # 0: 120 are too many, and (268 + 500 - 120) / 1 too; opens 3
    (220, {"client-0000": 100}),  # joins 2: 20 steps, as 1 did with (240 - 120) / 2 = 60, and not 3 with 50
    (240, {"client-0000": 20, "client-0001": 60, "client-0002": 28}),
]


def devices(folder: Path, seconds: dict[str, float]) -> str:
    """A profile by which a step on 16 examples takes so long."""
    rows = [f"{name},{16 / each!r}" for name, each in seconds.items()]
    (folder / "devices.csv").write_text("\n".join(["client,examples_per_second", *rows]))
    return str(folder / "devices.csv")


STEPS = {"client-0000": 1.0, "client-0001": 2.0, "client-0002": 5.0}


def test_groups_arrive_together_by_hand(tmp_path: Path) -> None:
    federation = {"devices": devices(tmp_path, STEPS)}
    result = run(setting_of(3, 6, federation=federation), tmp_path / "r")
    found = [(line["simulated"]["elapsed"], line["assigned_steps"]) for line in result.rounds]
    assert [steps for _, steps in found] == [steps for _, steps in BY_HAND]
    assert [end for end, _ in found] == pytest.approx([end for end, _ in BY_HAND])
    later = Compass(lambda name, version, steps: steps * STEPS[name], list(STEPS)).merges()
    for end, steps in BY_HAND:
        time, tasks = next(later)
        assert time == pytest.approx(end) and {name: task.steps for name, task in tasks.items()} == steps


def test_whoever_is_late_is_merged_alone_and_its_group_waits_no_longer(tmp_path: Path) -> None:
    """Client 1 is slow once: group 1 is merged at its latest time, 140, and client 1 when it is done."""

    def seconds(name: str, version: int, steps: int) -> float:
        return steps * STEPS[name] * (2 if (name, version) == ("client-0001", 2) else 1)

    found = Compass(seconds, list(STEPS)).merges()
    merged = [(time, sorted(tasks)) for time, tasks in (next(found) for _ in range(5))]
    assert merged[3] == (140, ["client-0000"]) and (200, ["client-0001"]) in merged

    class Slow(StepTimes):
        def arrivals(self, call: CohortRequest) -> list[float]:
            assert call.steps is not None
            return [seconds(name, call.round - 1, call.steps) for name in call.cohort]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_round, "StepTimes", Slow)
        lines = run(setting_of(3, 5), tmp_path).rounds
    assert [line["cohort"] for line in lines] == [names for _, names in merged]


def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path: Path) -> None:
    setting = setting_of(6, 10, {"lr_schedule": "cosine"}, federation={"concurrency": 5})
    whole = run(setting, tmp_path / "whole")
    steps = [count for line in whole.rounds for count in line["assigned_steps"].values()]
    assert all(LEAST <= count <= MOST for count in steps) and len(set(steps)) > 3
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole.model_sha256
    population, (_, memory) = Population.of(setting), books_in(tmp_path / "r")
    stopped = Breaks.of(population, memory=memory)
    stopped.left = 8
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, stopped, tmp_path / "r", cached_test_set(population, None))
    resumed = run(setting, tmp_path / "r", resume=True)
    assert resumed.model_sha256 == whole.model_sha256
    found = [[line["assigned_steps"] for line in result.rounds] for result in (resumed, whole)]
    assert found[0] == found[1]


def test_networks_take_the_steps_that_they_are_given_in_both_engines(tmp_path: Path) -> None:
    table = {
        "backbone": {"name": "atoll:lenet", "weights": "random", "image_size": 16},
        "data": few_pictures(12, classes=2) | {"validation_fraction": 0},
        "tune": {"method": "full"},
        "train": {"lr": 0.01, "batch_size": 4},
        "strategy": {"name": "fedcompass", "options": {"min_steps": 1, "max_steps": 4}},
        "federation": {"clients": 3, "concurrency": 3, "rounds": 4},
    }
    setting = Job.parse(DIGITS | table, origin="test")
    found = [run(setting, tmp_path / engine, engine=engine) for engine in ("inline", "cohort")]
    assert [line["assigned_steps"] for line in found[0].rounds] == [
        line["assigned_steps"] for line in found[1].rounds
    ]
    losses = [[line["loss"] for line in result.rounds] for result in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class Sites(InlineTransport):
    """Sites that take their time, by a clock that the test turns."""

    clock: TurnedClock
    asked: list[tuple[str, int]]

    def ask_ahead(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply | None]:
        assert isinstance(request, TrainRequest)
        steps = int(request.plan[ASSIGNED_STEPS])
        self.asked += [(name, steps) for name in names]
        due = {reply.client: reply for reply in self.send_and_receive(request, names, timeout)}
        begins = self.clock.now
        while due:
            for name in [name for name in due if self.clock.now >= begins + steps * STEPS[name]]:
                yield due.pop(name)
            if due:
                yield None


def test_by_arrival_speeds_are_those_of_the_servers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks are an eighth of a second apart, which a float has exactly."""
    clock = TurnedClock()
    monkeypatch.setattr(ahead, "time", clock)
    monkeypatch.setattr(grouped_round, "time", clock)
    monkeypatch.setattr(ahead, "LOOK_SECONDS", 0.125)
    setting = setting_of(3, 6, federation={"order": "arrival"})
    population = Population.of(setting)
    sites = Sites.of(population)
    sites.clock, sites.asked = clock, []
    result = run_job(setting, sites, tmp_path, cached_test_set(population, None), report=False)
    assert [line["assigned_steps"] for line in result.rounds] == [steps for _, steps in BY_HAND]
    assert clock.now == 1000 + 240
    assert len(sites.asked) == 3 + 1 + 1 + 1 + 2 + 1


def test_a_site_takes_no_other_steps_than_its_job_allows() -> None:
    setting = setting_of(3, 2)
    population = Population.of(setting)
    [info] = population.roster(setting).data_info
    site, learner = Site(population), Learner.of(setting, task_named(setting.task.name), info)
    info = info | {"backbone": learner.backbone.fingerprint}
    request = TrainRequest(setting.canonical, setting.hash, 1, info, learner.initial(), plan={})

    def answered(steps: float, job: Job = setting) -> Reply:
        one = replace(request, job=job.canonical, job_hash=job.hash, plan={ASSIGNED_STEPS: steps})
        [reply] = site.answer(one, ["client-0000"])
        return reply

    assert isinstance(answered(LEAST), Update)
    for steps in (LEAST - 1, MOST + 1, 20.5, math.inf, math.nan):
        reply = answered(steps)
        assert isinstance(reply, Failure) and "local steps, and the job 20 to 100" in reply.reason
    fedbuff = heads({"name": "fedbuff"}, federation={"cohort": 1, "concurrency": 2})
    refused = answered(LEAST, fedbuff)
    assert isinstance(refused, Failure) and "which the job's strategy doesn't" in refused.reason


@pytest.mark.parametrize("rule", ["max_epochs", "min_clients"])
def test_a_sites_bounds_on_epochs_and_clients_refuse_it(rule: str) -> None:
    violation = Policy.model_validate({rule: 2}).violation(setting_of(3, 2), TrainRequest)
    assert rule in violation and "strategy.name" in violation


CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 0.2}


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"federation": {"concurrency": None}}, r"federation\.concurrency: missing; fedcompass .* from 1 to"),
        ({"federation": {"concurrency": 4}}, r"federation\.concurrency: expected from 1 to .* = 3, found 4"),
        ({"federation": {"cohort": 2}}, r"federation\.cohort: fedcompass merges groups .* found 2"),
        ({"federation": {"cohort_rate": 0.5}}, r"federation\.cohort_rate: fedcompass merges groups"),
        ({"train": {"epochs": 2}}, r"train\.epochs: fedcompass gives each client a number of local steps"),
        ({"train": {"steps": 5}}, r"train\.steps: fedcompass gives each client"),
        ({"privacy": EXAMPLE}, r"strategy\.name: fedcompass gives .* ledgers are charged"),
        ({"privacy": CLIENT}, r"strategy\.name: expected one of fedavg, .* found 'fedcompass'"),
        ({"federation": {"secure_aggregation": True}}, "secure_aggregation: .* at the same time"),
        ({"federation": {"compression": "int8"}}, r"federation\.error_feedback: "),
        ({"personal": {"keep": "head"}}, r"personal\.keep: "),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tables: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        setting_of(3, 2, **tables)


def test_bounds_that_are_no_bounds_are_refused(tmp_path: Path) -> None:
    setting = setting_of(3, 2, {"options": {"min_steps": 5, "max_steps": 4}})
    with pytest.raises(ConfigError, match=r"min_steps: expected at most max_steps = 4, found 5"):
        run(setting, tmp_path)
