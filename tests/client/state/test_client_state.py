"""SCAFFOLD and FedDyn, whose clients keep tensors of their own: their papers' algorithms, engines, kills."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from atoll.client.state.scaffold import ScaffoldClient
from atoll.client.training.batches import batches
from atoll.client.training.local_sgd import train_model
from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.job.train import TrainSection
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import Request, TrainRequest
from atoll.report.run_result import RunResult
from atoll.server.job_checks import check_named
from atoll.server.rounds.validation import validate_updates
from atoll.server.run.run_job import run_job
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.engines.engine import cached_test_set, check_engine
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import books_in
from atoll.sim.engines.simulated_site import IndexedClients, PopulationIndex
from atoll.sim.population.population import Population
from atoll.strategies.scaffold import Scaffold
from atoll.tasks import task_named
from tests.sim.test_simulation import run
from tests.strategies.test_strategy_runs import of_pixels
from tests.support.small import few_pictures, image_job

SCAFFOLD_I = {"name": "scaffold", "options": {"option": 1}}
SCAFFOLD_II = {"name": "scaffold", "lr": 0.9}
FEDDYN = {"name": "feddyn", "options": {"alpha": 0.2}}
METHODS = (SCAFFOLD_I, SCAFFOLD_II, FEDDYN)
NAMES = ("scaffold-1", "scaffold-2", "feddyn")

Array = NDArray[np.float64]


def heads(strategy: dict[str, Any], **tables: Any) -> Job:
    federation = {"clients": 6, "cohort": 3, "quorum": 1.0, "rounds": 5} | tables.pop("federation", {})
    train = {"lr": 0.5, "batch_size": 16, "epochs": 2}
    return of_pixels(federation, **{"strategy": strategy, "train": train} | tables)


class Clients:
    """What the clients of a job train on."""

    def __init__(self, setting: Job) -> None:
        population = Population.of(setting)
        [info] = population.roster(setting).data_info
        self.setting = setting
        self.learner = Learner.of(setting, task_named(setting.task.name), info)
        self.names = population.names(setting)
        self.train = IndexedClients(PopulationIndex(population, self.learner), self.names).train


class Softmax(Clients):
    """A linear head in NumPy, float64: one matrix [classes, width + 1], the bias as its last column."""

    def __init__(self, setting: Job) -> None:
        super().__init__(setting)
        self.data = {name: self._table(self.train(name)) for name in self.names}

    def _table(self, shard: Any) -> tuple[Array, NDArray[np.int64]]:
        features = self.learner.features.for_training(shard)[0].double().numpy()
        return np.hstack([features, np.ones((len(features), 1))]), shard.targets.numpy()

    @property
    def start(self) -> Array:
        return matrix(self.learner.initial())

    def gradient(self, w: Array, client: str, rows: Any = slice(None)) -> Array:
        x, y = self.data[client][0][rows], self.data[client][1][rows]
        z = x @ w.T
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        return np.asarray(p.T @ x / len(y))

    def batches(self, client: str, round: int) -> list[list[int]]:
        return batches(len(self.data[client][1]), self.setting, round, client)


def matrix(tensors: dict[str, torch.Tensor], prefix: str = "") -> Array:
    weight, bias = (tensors[f"{prefix}head.{part}"].double().numpy() for part in ("weight", "bias"))
    return np.hstack([weight, bias[:, None]])


def final(out: Path, prefix: str) -> Array:
    last = max((out / "checkpoints").glob("*.safetensors"))
    return matrix(load_file(last), prefix)


@pytest.mark.parametrize(("option", "section"), [(1, SCAFFOLD_I), (2, SCAFFOLD_II)])
def test_scaffold_is_algorithm_1_of_its_paper(tmp_path: Path, option: int, section: dict[str, Any]) -> None:
    """Karimireddy et al. 2020, line by line in NumPy; three of six clients take part in a round."""
    setting = heads(section)
    result = run(setting, tmp_path)
    problem, eta_l, eta_g, count = Softmax(setting), 0.5, section.get("lr", 1.0), 6
    x = problem.start
    c = np.zeros_like(x)
    own = {name: np.zeros_like(x) for name in problem.data}
    for line in result.rounds:
        moves, renewals = [], []
        for i in line["cohort"]:
            y, steps = x.copy(), problem.batches(i, line["round"])
            for rows in steps:
                y = y - eta_l * (problem.gradient(y, i, rows) - own[i] + c)
            first = problem.gradient(x, i)
            plus = first if option == 1 else own[i] - c + (x - y) / (len(steps) * eta_l)
            moves.append(y - x)
            renewals.append(plus - own[i])
            own[i] = plus
        x = x + eta_g / len(moves) * sum(moves)
        c = c + len(moves) / count * (sum(renewals) / len(renewals))
    assert len({tuple(line["cohort"]) for line in result.rounds}) > 1
    np.testing.assert_allclose(final(tmp_path, "model/"), x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(final(tmp_path, "state/c."), c, rtol=0, atol=1e-6)


def test_feddyn_is_algorithm_1_of_its_paper(tmp_path: Path) -> None:
    """Acar et al. 2021, with SGD's local steps in place of the exact minimum."""
    setting = heads(FEDDYN)
    result = run(setting, tmp_path)
    problem, lr, alpha, count = Softmax(setting), 0.5, 0.2, 6
    theta = problem.start
    h = np.zeros_like(theta)
    own = {name: np.zeros_like(theta) for name in problem.data}
    for line in result.rounds:
        arrived = []
        for k in line["cohort"]:
            w = theta.copy()
            for rows in problem.batches(k, line["round"]):
                w = w - lr * (problem.gradient(w, k, rows) - own[k] + alpha * (w - theta))
            own[k] = own[k] - alpha * (w - theta)
            arrived.append(w)
        h = h - alpha / count * sum(w - theta for w in arrived)
        theta = sum(arrived) / len(arrived) - h / alpha
    np.testing.assert_allclose(final(tmp_path, "model/"), theta, rtol=0, atol=1e-6)
    np.testing.assert_allclose(final(tmp_path, "state/h."), h, rtol=0, atol=1e-6)


def networks(strategy: dict[str, Any]) -> Job:
    return image_job(
        "squeezenet1_1",
        data=few_pictures(14, classes=2),
        tune={"method": "full"},
        train={"lr": 0.01, "batch_size": 4},
        strategy=strategy,
        federation={"clients": 2, "quorum": 1.0, "rounds": 2},
    )


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunResult]:
    """What whole models come to with a method: two tests compare others with it."""

    @cache
    def of(name: str) -> RunResult:
        return run(networks(METHODS[NAMES.index(name)]), tmp_path_factory.mktemp("inline") / "run")

    return of


Known = Callable[[str], RunResult]


@pytest.mark.parametrize(("name", "strategy"), list(zip(NAMES, METHODS, strict=True)), ids=NAMES)
def test_whole_models_are_corrected_with_the_same_bits_one_client_at_a_time(
    tmp_path: Path, name: str, strategy: dict[str, Any], in_one_process: Known
) -> None:
    whole = in_one_process(name)
    assert not any(line["set_aside"] for line in whole.rounds)
    assert run(networks(strategy), tmp_path, engine="loop").model_sha256 == whole.model_sha256


@pytest.mark.processes
def test_whole_models_are_corrected_with_the_same_bits_in_worker_processes(
    tmp_path: Path, in_one_process: Known
) -> None:
    """A client's control variate is reached from whichever process trains it."""
    whole = in_one_process("scaffold-1")
    assert run(networks(SCAFFOLD_I), tmp_path, workers=2).model_sha256 == whole.model_sha256


def test_the_correction_of_a_whole_model_is_added_to_every_step() -> None:
    setting = networks(SCAFFOLD_II)
    problem = Clients(setting)
    learner, shard = problem.learner, problem.train("client-0000")
    start = learner.initial()

    def trained(**options: Any) -> dict[str, torch.Tensor]:
        once = {"client": "client-0000", "round": 1, "plan": {}, "steps": 1}
        return train_model(learner, start, shard, setting, **once, **options).delta

    plain = trained()
    added = trained(correction={name: torch.full_like(t, 0.5) for name, t in start.items()})
    for name, delta in plain.items():
        torch.testing.assert_close(
            added[name] - delta, torch.full_like(delta, -0.01 * 0.5), rtol=1e-3, atol=1e-6
        )


class DiesBeforeTheMerge(InlineTransport):
    """Stops the run when all clients of its third round have answered, and remember that round."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        answers = list(super().send_and_receive(request, names, timeout))
        if isinstance(request, TrainRequest) and request.round == 3:
            raise KeyboardInterrupt
        return answers


@pytest.mark.parametrize("strategy", METHODS, ids=NAMES)
def test_a_kill_between_a_clients_memory_and_the_merge_changes_no_bit(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    setting = heads(strategy)
    expected = run(setting, tmp_path / "whole").model_sha256
    population = Population.of(setting)
    _, memory = books_in(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run_job(
            setting,
            DiesBeforeTheMerge.of(population, memory=memory),
            tmp_path / "killed",
            cached_test_set(population, None),
        )
    assert list((tmp_path / "killed" / "memory").rglob("round-000003.safetensors"))
    assert run(setting, tmp_path / "killed", resume=True).model_sha256 == expected


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_control_variate_is_the_mean_gradient_of_the_local_steps(momentum: float) -> None:
    """By torch's SGD, whose gradients are 3 everywhere before they are corrected by c - c_i = 2 - 0.5."""
    at = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([at], lr=0.1, momentum=momentum)
    for _ in range(6):
        at.grad = torch.full_like(at, 3.0 + (2.0 - 0.5))
        optimizer.step()
    client = ScaffoldClient(TrainSection(batch_size=16, epochs=2, lr=0.1, momentum=momentum), option=2)
    update = Update("a", 1, {"w": at.detach()}, 33)
    own, sent = {"w": torch.tensor([0.5])}, {"w": torch.tensor([2.0])}
    assert client.correction(own, sent)["w"].item() == 1.5
    kept, answer = client.after(update, own, sent, {})
    assert kept["w"].item() == pytest.approx(3.0) and answer["w"].item() == pytest.approx(2.5)


def test_a_client_without_examples_keeps_what_it_has() -> None:
    client = ScaffoldClient(TrainSection(), option=2)
    own = {"w": torch.tensor([0.5])}
    kept, answer = client.after(Update("a", 1, {"w": torch.zeros(1)}, 0), own, {"w": torch.ones(1)}, {})
    assert kept == own and answer["w"].item() == 0.0


def answered(client: str, answer: dict[str, torch.Tensor]) -> Update:
    loss = {f"train_loss.{part}": torch.zeros((), dtype=torch.float64) for part in ("sum", "count")}
    return Update(client, 1, {"w": torch.ones(2)}, 3, loss, answer)


def test_a_wrong_answer_to_the_strategy_sets_its_client_aside() -> None:
    model = sent = {"w": torch.zeros(2)}
    answers = {
        "a": {"w": torch.ones(2)},
        "b": {},
        "c": {"w": torch.ones(3)},
        "d": {"w": torch.tensor([1.0, torch.nan])},
        "e": {"w": torch.ones(2), "v": torch.ones(2)},
        "f": {"w": torch.full((2,), 1e7)},
    }
    updates = [answered(client, answer) for client, answer in answers.items()]
    found = validate_updates(updates, list(answers), model, 1, sent)
    assert [u.client for u in found.updates] == ["a"]
    assert {
        client: why.removeprefix("answer to the strategy: ") for client, why in found.set_aside.items()
    } == {
        "b": "tensor w is missing",
        "c": "tensor w has shape (3,), expected (2,)",
        "d": "tensor w has values that are not finite",
        "e": "tensor v is unexpected",
        "f": "the update's norm is 1.41e+07, expected at most 1e+06",
    }
    unasked = validate_updates([updates[0]], ["a"], model, 1)
    assert unasked.set_aside == {"a": "answer to the strategy: tensor w is unexpected"}


def test_scaffold_without_control_variates_says_so() -> None:
    strategy = Scaffold(clients=2)
    model = {"w": torch.zeros(2)}
    with pytest.raises(InconsistentUpdates, match="updates without control variates"):
        strategy.merge(model, [answered("a", {})], strategy.begin(model))


EXAMPLE = {"unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25}


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"privacy": EXAMPLE}, r"strategy\.name: {} corrects each local step, .* no noise protects"),
        ({"federation": {"compression": "int8"}}, r"federation\.compression: what {}'s clients keep"),
        ({"personal": {"keep": "mixture"}}, r"personal\.keep: {}'s clients correct steps of the one model"),
        ({"tune": {"then": [{"method": "full", "after": 1}]}}, r"tune\.then: .* with strategy\.name = '{}'"),
    ],
)  # fmt: skip
def test_what_would_not_be_exact_is_refused_in_one_line(
    name: str, tables: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern.format(name)) as caught:
        heads({"name": name}, **tables)
    assert "\n" not in str(caught.value)


def test_who_trains_such_clients_without_corrections_refuses_them() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.name: engine cohort .* without scaffold's corrections"):
        check_engine(networks(SCAFFOLD_II), "cohort")
    check_engine(heads(SCAFFOLD_II), "cohort")
    with pytest.raises(ConfigError, match=r"strategy\.name: a run with it can't be attacked"):
        job_to_replay(heads(SCAFFOLD_II))


@pytest.mark.parametrize(
    ("section", "train", "pattern"),
    [
        ({"name": "scaffold"}, {"optimizer": "adam"}, r"train\.optimizer: .* expected 'sgd', found 'adam'"),
        ({"name": "scaffold"}, {"precision": "fp16"}, r"train\.precision: 'fp16' leaves steps out"),
        ({"name": "scaffold", "options": {"option": 3}}, {}, r"options\.option: expected less than or equal"),
        ({"name": "feddyn", "options": {"alpha": 0.0}}, {}, r"options\.alpha: expected greater than 0"),
        ({"name": "feddyn", "lr": 1.0}, {}, r"strategy\.lr: feddyn does not use it"),
    ],
)  # fmt: skip
def test_wrong_settings_are_answered_in_one_line(
    section: dict[str, Any], train: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        check_named(heads(section, train=train))
    assert "\n" not in str(caught.value)
