"""q-FedAvg and agnostic federated learning: their papers' algorithms in NumPy, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job, StrategySection
from atoll.job.train import TrainSection
from atoll.learning import trainable
from atoll.protocol.messages import RECEIVED_LOSS, Update
from atoll.protocol.requests import Request
from atoll.protocol.stacked_updates import stacked
from atoll.server.run.checkpoint import latest
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from atoll.strategies import build_strategy
from atoll.strategies.fair.afl import PREFIX, AgnosticFederatedLearning, nearest_in_simplex
from atoll.strategies.fair.qffl import QFedAvg
from tests.client.state.test_client_state import Array, Clients, Softmax, final, heads
from tests.sim.test_simulation import run
from tests.support.small import few_pictures, image_job


class Measured(Softmax):
    """A head in NumPy that also says its mean cross-entropy on a client's training examples."""

    def loss(self, w: Array, client: str) -> float:
        x, y = self.data[client]
        z = x @ w.T
        z = z - z.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]))

    def trained(self, w: Array, client: str, round: int, lr: float) -> Array:
        for rows in self.batches(client, round):
            w = w - lr * self.gradient(w, client, rows)
        return w


@pytest.mark.parametrize("q", [0.0, 0.5, 3.0])
def test_qffl_is_algorithm_2_of_its_paper(tmp_path: Path, q: float) -> None:
    """Li et al. 2020, line by line; three of six clients take part in a round."""
    setting = heads({"name": "qffl", "options": {"q": q}})
    result = run(setting, tmp_path)
    problem, lr = Measured(setting), 0.5
    w = problem.start
    for line in result.rounds:
        numerator, denominator = np.zeros_like(w), 0.0
        for k in line["cohort"]:
            loss = problem.loss(w, k)
            delta_w = (w - problem.trained(w, k, line["round"], lr)) / lr
            numerator += loss**q * delta_w
            denominator += q * loss ** (q - 1) * (delta_w**2).sum() + loss**q / lr
        w = w - numerator / denominator
    np.testing.assert_allclose(final(tmp_path, "model/"), w, rtol=0, atol=1e-6)


def projected(values: Array) -> Array:
    """The nearest point of the simplex, by bisection for the shift that makes the sum 1."""
    low, high = values.min() - 1, values.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(values - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(values - high, 0)


@pytest.mark.parametrize("cohort", [6, 3])
def test_afl_is_stochastic_afl_of_its_paper(tmp_path: Path, cohort: int) -> None:
    """Mohri et al. 2019, figure 2; with three of six clients both gradients are estimates, N / n times."""
    section = {"name": "afl", "lr": 0.8, "options": {"lambda_lr": 0.5}}
    setting = heads(section, federation={"cohort": cohort})
    result = run(setting, tmp_path)
    problem, lr = Measured(setting), 0.5
    w, weights = problem.start, dict.fromkeys(problem.names, 1 / 6)
    for line in result.rounds:
        here, scale = line["cohort"], 6 / cohort
        deltas = {i: problem.trained(w, i, line["round"], lr) - w for i in here}
        losses = {i: problem.loss(w, i) if i in here else 0.0 for i in problem.names}
        w = w + 0.8 * scale * sum(weights[i] * deltas[i] for i in here)
        moved = projected(np.array([weights[i] + 0.5 * scale * losses[i] for i in problem.names]))
        weights = dict(zip(problem.names, moved.tolist(), strict=True))
    np.testing.assert_allclose(final(tmp_path, "model/"), w, rtol=0, atol=1e-6)
    state = last_state(setting, tmp_path)
    seen = {name for line in result.rounds for name in line["cohort"]}
    assert {name: state[PREFIX + name] for name in seen} == pytest.approx(
        {name: weights[name] for name in seen}, abs=1e-6
    )
    assert max(weights.values()) - min(weights.values()) > 0.05


def last_state(setting: Job, out: Path) -> dict[str, Any]:
    found = latest(out / "checkpoints", setting.hash)
    assert found is not None
    return dict(found.state)


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_point_of_the_simplex_is_that_of_bisection(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 2, 7)
    found = nearest_in_simplex(values.tolist())
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    np.testing.assert_allclose(found, projected(values), rtol=0, atol=1e-12)


def two(first: float | None, second: float | None) -> list[Update]:
    updates = [Update(name, 1, {"w": torch.tensor([d])}, 5) for name, d in (("a", 2.0), ("b", 6.0))]
    told = [
        {} if loss is None else {RECEIVED_LOSS: torch.tensor(loss, dtype=torch.float64)}
        for loss in (first, second)
    ]
    return [replace(update, states=states) for update, states in zip(updates, told, strict=True)]


def test_qffl_by_hand() -> None:
    # L = 2, q = 1, F = 1 and 3: Delta w = -4, -12; Delta = -4, -36; h = 16 + 2, 144 + 6; 40 / 168
    for updates in (two(1.0, 3.0), stacked(two(1.0, 3.0))):
        merged, _ = QFedAvg(2.0).merge({"w": torch.zeros(1)}, updates, {})
        assert merged["w"].item() == pytest.approx(40 / 168)


@pytest.mark.parametrize("q", [0.1, 1000.0])
def test_qffl_is_finite_for_every_loss(q: float) -> None:
    for losses in ((0.0, 0.0), (0.0, 1e4), (1e-300, 1e300)):
        merged, _ = QFedAvg(10.0, q).merge({"w": torch.zeros(1)}, two(*losses), {})
        assert bool(torch.isfinite(merged["w"]).all())


def test_afl_by_hand() -> None:
    # lambda = 1/2, 1/2, so w moves by 4; then 0.5 + 0.1 * (1, 3) = 0.6, 0.8 and less 0.2 each is 0.4, 0.6
    strategy = AgnosticFederatedLearning(2)
    model = {"w": torch.zeros(1)}
    for updates in (two(1.0, 3.0), stacked(two(1.0, 3.0))):
        merged, state = strategy.merge(model, updates, strategy.begin(model))
        assert merged["w"].item() == pytest.approx(4.0)
        assert state == pytest.approx({"lambda.a": 0.4, "lambda.b": 0.6, "lambda": 0.0})


def test_the_lipschitz_estimate_is_1_over_the_clients_learning_rate_unless_it_is_said() -> None:
    section = StrategySection(name="qffl")
    assert build_strategy(section, train=TrainSection(lr=0.25)) == QFedAvg(4.0)
    assert build_strategy(section.model_copy(update={"options": {"lipschitz": 3, "q": 2}})) == QFedAvg(3, 2)


@pytest.mark.parametrize("strategy", [QFedAvg(1.0), AgnosticFederatedLearning(2)], ids=["qffl", "afl"])
def test_an_update_without_its_loss_is_named(strategy: Any) -> None:
    model = {"w": torch.zeros(1)}
    with pytest.raises(InconsistentUpdates, match="b sent no received_loss"):
        strategy.merge(model, two(1.0, None), strategy.begin(model))


def test_qffl_takes_no_loss_below_0() -> None:
    with pytest.raises(InconsistentUpdates, match="b sent a loss of -1, expected at least 0"):
        QFedAvg(1.0).merge({"w": torch.zeros(1)}, two(1.0, -1.0), {})


EXAMPLE = {"unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25}


@pytest.mark.parametrize("name", ["qffl", "afl"])
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"privacy": EXAMPLE}, r"strategy\.name: .* needs each client's loss, which no noise protects"),
        ({"personal": {"keep": "head"}, "tune": {"method": "full"}}, r"personal\.keep: .* weighs clients by"),
    ],
    ids=["privacy", "personal"],
)
def test_where_the_loss_must_not_leave_the_strategy_is_refused_by_name(
    name: str, tables: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        heads({"name": name}, **tables)


def test_afl_leaves_the_worst_client_with_less_loss_than_fedavg(tmp_path: Path) -> None:
    worst = {}
    for name in ("fedavg", "afl", "qffl"):
        setting = heads({"name": name}, federation={"cohort": 6, "rounds": 12})
        run(setting, tmp_path / name)
        problem = Measured(setting)
        worst[name] = max(problem.loss(final(tmp_path / name, "model/"), k) for k in problem.names)
    assert worst["afl"] < worst["fedavg"]


class Listening(InlineTransport):
    """Keeps what each update of the first round says of the model that it received."""

    heard: ClassVar[dict[str, float]] = {}

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            if isinstance(reply, Update) and reply.round == 1:
                self.heard[reply.client] = float(reply.states[RECEIVED_LOSS])
            yield reply


def small_network(name: str) -> Job:
    return image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "full"},
        train={"lr": 0.01, "batch_size": 4, "dropout": 0.0}, strategy={"name": name},
        federation={"clients": 2, "quorum": 1.0, "rounds": 2},
    )  # fmt: skip


def test_the_loss_of_a_network_is_its_mean_cross_entropy_and_all_engines_give_the_same_bits(
    tmp_path: Path,
) -> None:
    setting = small_network("afl")
    population = Population.of(setting)
    heard = run_job(setting, Listening.of(population), tmp_path / "one", cached_test_set(population, None))
    clients = Clients(setting)
    learner = clients.learner
    trainable.load_values(learner.model, learner.initial())
    learner.model.eval()
    for name in clients.names:
        shard = clients.train(name)
        with torch.no_grad():
            outputs = learner.model(learner.collate(shard, range(len(shard)), None))
        expected = torch.nn.functional.cross_entropy(outputs, shard.targets)
        assert Listening.heard[name] == pytest.approx(float(expected), rel=1e-4)
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == heard.model_sha256
