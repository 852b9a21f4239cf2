"""Ditto and its kin against their papers' algorithms, written out in NumPy; and what leaves a client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.state.fedrep import train_fedrep
from atoll.client.state.personalization import model_to_evaluate
from atoll.client.state.store import ClientStateStore
from atoll.client.training.batches import batches
from atoll.client.training.local_adaptation import adapt_locally
from atoll.client.training.local_sgd import train_model
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.personal import PersonalSection
from atoll.learning import trainable
from atoll.protocol.requests import EvaluateRequest, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.trained import trained
from tests.client.state.test_client_state import Array, Clients, Softmax, final, heads, matrix
from tests.client.state.test_personal import stopped_and_resumed
from tests.sim.test_simulation import run
from tests.support.small import few_pictures, image_job

APFL = {"keep": "mixture", "method": "apfl"}
LR = 0.5
FEDAVG = {"name": "fedavg"}


def ditto(pull: float, **tables: Any) -> Job:
    tables["federation"] = {"rounds": 3} | tables.pop("federation", {})
    return heads(FEDAVG, personal={"keep": "mixture", "pull": pull, "epochs": 3}, **tables)


def models(out: Path) -> dict[str, Array]:
    """Each client's own model, as a matrix of weights and bias."""
    memory = ClientStateStore(out / "memory", of_one_run=True)
    states = {f"client-000{n}": memory.load_before("", f"client-000{n}", 99) for n in range(6)}
    return {client: matrix(state, "own/") for client, state in states.items() if state}


def fedavg(problem: Softmax, lines: list[dict[str, Any]]) -> list[Array]:
    """The shared model w before every round, and after the last."""
    shared = [problem.start]
    for line in lines:
        sums, count = np.zeros_like(problem.start), 0
        for k in line["cohort"]:
            w, examples = shared[-1].copy(), len(problem.data[k][1])
            for rows in problem.batches(k, line["round"]):
                w = w - LR * problem.gradient(w, k, rows)
            sums, count = sums + examples * (w - shared[-1]), count + examples
        shared.append(shared[-1] + sums / count)
    return shared


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_ditto_is_algorithm_1_of_its_paper(tmp_path: Path, pull: float) -> None:
    """Li et al. 2021, line by line; with lambda = 0 the same loop is a client's local training alone."""
    setting = ditto(pull)
    result = run(setting, tmp_path)
    problem = Softmax(setting)
    shared = fedavg(problem, result.rounds)
    own: dict[str, Array] = {}
    for line, w in zip(result.rounds, shared, strict=False):
        for k in line["cohort"]:
            v = own.get(k, w).copy()
            longer = setting.model_copy(update={"train": setting.train.model_copy(update={"epochs": 3})})
            for rows in batches(len(problem.data[k][1]), longer, line["round"], k):
                held = pull * (v - w) if pull else 0
                v = v - LR * (problem.gradient(v, k, rows) + held)
            own[k] = v
    found = models(tmp_path)
    assert found.keys() == own.keys() and len(own) > 3
    for k, v in own.items():
        np.testing.assert_allclose(found[k], v, rtol=0, atol=2e-6)


def test_a_great_lambda_holds_own_models_at_the_shared_one(tmp_path: Path) -> None:
    """One step away at most: with eta lambda = 1 a step leads from anywhere to w - eta grad F_k(v)."""
    federation, train = {"cohort": 6, "rounds": 1}, {"lr": 1e-3, "batch_size": 16}
    setting = ditto(1e3, federation=federation, train=train)
    run(setting, tmp_path)
    start = Softmax(setting).start
    for v in models(tmp_path).values():
        assert 0 < np.abs(v - start).max() < 2e-3  # no entry of such a gradient is over 2


SEEDED = {"noise_multiplier": 0.7, "delta": 1e-3, "clipping_norm": 0.5, "seeded_noise": True}
PROMISES: dict[str, dict[str, Any]] = {
    "client, distributed": {"privacy": SEEDED | {"unit": "client", "where": "distributed"}},
    "example": {"privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25}},
    "example, distributed": {
        "privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25, "where": "distributed"},
        "train": {"lr": LR, "batch_size": 16},
    },
    "secure sum": {"federation": {"secure_aggregation": True}},
}


ONE_ROUND = {"cohort": 3, "rounds": 1}


@pytest.fixture(scope="module")
def open_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Array]]:
    """Own models after a round without a promise, by `[train]`."""
    found = {}
    for train in (None, PROMISES["example, distributed"]["train"]):
        out = tmp_path_factory.mktemp("open")
        run(ditto(0.7, federation=ONE_ROUND, **{} if train is None else {"train": train}), out)
        found[str(train)] = models(out)
    return found


@pytest.mark.parametrize("promise", PROMISES)
def test_what_leaves_under_a_promise_is_what_leaves_without_own_models(
    tmp_path: Path, promise: str, open_models: dict[str, dict[str, Array]]
) -> None:
    """And an own model is the one of a run without a promise: no noise, and as many epochs, of its own."""
    tables = {"federation": {}} | PROMISES[promise]
    tables["federation"] = ONE_ROUND | tables["federation"]
    own, plain = ditto(0.7, **tables), heads(FEDAVG, **tables)
    result, without = run(own, tmp_path / "own"), run(plain, tmp_path / "plain")
    assert result.model_sha256 == without.model_sha256
    assert result.rounds[0]["metrics"] == without.rounds[0]["metrics"]
    if promise != "secure sum":
        assert result.final["clients"] == {} and result.personal["clients"] == {}
    found, expected = models(tmp_path / "own"), open_models[str(tables.get("train"))]
    assert found.keys() == expected.keys() and len(found) == 3
    assert all(np.array_equal(v, expected[client]) for client, v in found.items())


def apfl(**tables: Any) -> Job:
    tables["federation"] = {"rounds": 3} | tables.pop("federation", {})
    return heads(FEDAVG, personal={"keep": "mixture", "method": "apfl", "mixing": 0.4}, **tables)


def test_apfl_is_algorithm_1_of_its_paper(tmp_path: Path) -> None:
    """Deng et al. 2020, line by line; what is used is alpha v + (1 - alpha) w."""
    setting = apfl()
    result = run(setting, tmp_path)
    problem, alpha = Softmax(setting), 0.4
    shared = fedavg(problem, result.rounds)
    own: dict[str, Array] = {}
    for line, start in zip(result.rounds, shared, strict=False):
        for i in line["cohort"]:
            w, v = start.copy(), own.get(i, start).copy()
            for rows in problem.batches(i, line["round"]):
                mixed = alpha * v + (1 - alpha) * w
                w = w - LR * problem.gradient(w, i, rows)
                v = v - LR * alpha * problem.gradient(mixed, i, rows)
            own[i] = v
    found = models(tmp_path)
    assert found.keys() == own.keys() and len(own) > 3
    for i, v in own.items():
        np.testing.assert_allclose(found[i], v, rtol=0, atol=2e-6)
    np.testing.assert_allclose(final(tmp_path, "model/"), shared[-1], rtol=0, atol=2e-6)
    clients = Clients(setting)
    w_end = {n: t.float() for n, t in trained(tmp_path)[1].items()}
    request = EvaluateRequest(setting.canonical, setting.hash, 3, clients.learner.data_info, w_end)
    memory = ClientStateStore(tmp_path / "memory", of_one_run=True)
    for i, v in own.items():
        used = model_to_evaluate(clients.learner, request, i, memory, lambda: clients.train("client-0000"))
        np.testing.assert_allclose(matrix(used), alpha * v + (1 - alpha) * shared[-1], rtol=0, atol=2e-6)


def test_apfl_in_a_network_takes_the_steps_that_two_networks_would() -> None:
    """The steps are those of plain training from known places; with alpha = 1 it is training alone."""
    setting = image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "last-k", "layers": 1},
        train={"lr": 0.5, "batch_size": 3, "dropout": 0.0}, federation={"clients": 2, "rounds": 1},
    )  # fmt: skip
    clients = Clients(setting)
    shard, w = clients.train("client-0000"), clients.learner.initial()
    v = {name: t + 0.01 for name, t in w.items()}

    def moved(begin: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        once: dict[str, Any] = {"client": "client-0000", "round": 1, "plan": {}, "begin": begin, "steps": 1}
        return train_model(clients.learner, w, shard, setting, **once | options).delta

    mixed = {name: 0.4 * v[name] + 0.6 * w[name] for name in w}
    step = {name: w[name] + delta - mixed[name] for name, delta in moved(mixed).items()}
    for name, delta in moved(v, mixing=0.4).items():
        torch.testing.assert_close(delta, v[name] + 0.4 * step[name] - w[name], rtol=1e-4, atol=1e-6)
    alone = moved(v, mixing=1.0, steps=3)
    for name, delta in moved(v, steps=3).items():
        torch.testing.assert_close(alone[name], delta, rtol=1e-4, atol=1e-6)


def test_apfl_has_the_same_bits_everywhere_and_leaves_the_shared_model_as_it_is(tmp_path: Path) -> None:
    setting = apfl()
    whole, loop = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="loop")
    again = stopped_and_resumed(setting, tmp_path / "c")
    plain = run(heads(FEDAVG, federation={"rounds": 3}), tmp_path / "plain")
    assert whole.final == loop.final == again.final
    assert whole.model_sha256 == plain.model_sha256
    assert whole.personal["global_clients"] == plain.final["clients"] != whole.final["clients"]
    for name in ("b", "c"):
        assert all(np.array_equal(v, models(tmp_path / name)[k]) for k, v in models(tmp_path / "a").items())


PER_FEDAVG = {"name": "per-fedavg", "lr": 0.9, "options": {"inner_lr": 0.3}}
ALPHA = 0.3


def test_per_fedavg_is_algorithm_1_of_its_paper_without_the_hessian(tmp_path: Path) -> None:
    """Fallah et al. 2020, Per-FedAvg (FO): the gradient of a batch after a step by the batch before."""
    setting = heads(PER_FEDAVG)
    result = run(setting, tmp_path)
    problem = Softmax(setting)
    w = problem.start
    for line in result.rounds:
        moves = []
        for i in line["cohort"]:
            own, order = w.copy(), problem.batches(i, line["round"])
            for number, rows in enumerate(order):
                adapted = own - ALPHA * problem.gradient(own, i, order[number - 1])
                own = own - LR * problem.gradient(adapted, i, rows)
            moves.append(own - w)
        w = w + 0.9 * sum(moves) / len(moves)
    assert len({len(problem.batches(i, 1)) for i in problem.data}) > 1
    np.testing.assert_allclose(final(tmp_path, "model/"), w, rtol=0, atol=2e-6)


def one_step(lr: float) -> tuple[Tensors, Callable[..., Tensors]]:
    """(a network's tensors, how far one step of a client without dropout moves them, by training options)."""
    setting = image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "last-k", "layers": 1},
        train={"lr": lr, "batch_size": 20, "dropout": 0.0}, federation={"clients": 2, "rounds": 1},
    )  # fmt: skip
    clients = Clients(setting)
    shard, w = clients.train("client-0000"), clients.learner.initial()

    def moved(**options: Any) -> Tensors:
        once: dict[str, Any] = {"client": "client-0000", "round": 1, "plan": {}, "steps": 1}
        return train_model(clients.learner, w, shard, setting, **once | options).delta

    return w, moved


def test_a_network_takes_the_gradient_of_a_step_where_a_step_before_led() -> None:
    """Two plain steps from known places make the one: w, and w' = w - alpha grad f(w; D)."""
    w, moved = one_step(lr=0.5)
    first = moved()
    adapted = {name: w[name] + ALPHA / 0.5 * delta for name, delta in first.items()}
    expected = {name: w[name] + delta - adapted[name] for name, delta in moved(begin=adapted).items()}
    for name, delta in moved(inner_lr=ALPHA).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(delta, first[name])


def test_per_fedavg_is_measured_after_a_step_of_its_own_and_has_the_same_bits_everywhere(
    tmp_path: Path,
) -> None:
    setting = heads(PER_FEDAVG, evaluate={"adapt": 1}, federation={"rounds": 3})
    whole, loop = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="loop")
    again = stopped_and_resumed(setting, tmp_path / "c")
    for other in (loop, again):
        assert (other.model_sha256, other.final) == (whole.model_sha256, whole.final)
    clients = Clients(setting)
    problem, shard, name = Softmax(setting), clients.train("client-0001"), "client-0001"
    w = {n: t.float() for n, t in clients.learner.initial().items()}
    request = EvaluateRequest(setting.canonical, setting.hash, 5, clients.learner.data_info, w)
    found = matrix(adapt_locally(clients.learner, request, name, shard, 1))
    [first, *_] = problem.batches(name, 6)
    expected = problem.start - ALPHA * problem.gradient(problem.start, name, first)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_per_fedavg_keeps_a_promise_to_clients(tmp_path: Path) -> None:
    """With next to no noise and a wide bound the noised mean is the even mean."""
    tables = {"federation": {"cohort": 3, "rounds": 1}}
    promise = {"noise_multiplier": 1e-6, "clipping_norm": 20.0, "delta": 1e-3, "unit": "client"}
    private = heads(PER_FEDAVG, privacy=promise | {"where": "distributed", "seeded_noise": True}, **tables)
    run(private, tmp_path / "private")
    run(heads(PER_FEDAVG, **tables), tmp_path / "open")
    noised, plain = (final(tmp_path / name, "model/") for name in ("private", "open"))
    np.testing.assert_allclose(noised, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        (
            {"privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25}},
            r"per-fedavg takes a step's gradients where other steps led, .* privacy\.unit = 'example'",
        ),
        ({"federation": {"secure_aggregation": True}}, "per-fedavg counts clients evenly"),
        ({"personal": {"keep": "mixture"}}, r"personal\.keep: per-fedavg makes one model for all to adapt"),
        ({"train": {"precision": "fp16"}}, r"train\.precision: 'fp16' scales gradients"),
        (
            {"backbone": {"name": "raw:pixels", "image_size": 8, "prune": 0.5}},
            r"backbone\.prune: per-fedavg's",
        ),
        ({"federation": {"weights": "examples"}}, r"federation\.weights: per-fedavg has a rule of its own"),
    ],
)
def test_what_per_fedavg_can_not_be_exact_with_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        heads(PER_FEDAVG, **tables)


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"personal": {"epochs": 2}}, "epochs has no meaning without keep = 'mixture'"),
        ({"personal": {"keep": "mixture", "mixing": 0.2}}, "mixing has no meaning with method = 'ditto'"),
        ({"personal": APFL | {"pull": 0.2}}, "pull has no meaning with method = 'apfl'"),
        ({"personal": APFL, "train": {"precision": "fp16"}}, r"train\.precision: 'fp16' scales gradients"),
        (
            {"personal": {"keep": "mixture"}, "privacy": SEEDED | {"unit": "client", "audit": True}},
            r"privacy\.audit: a run with personal\.keep can't be attacked",
        ),
    ],
)
def test_what_has_no_meaning_or_can_not_be_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        heads(FEDAVG, **tables)


def fedrep(**tables: Any) -> Job:
    return image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "last-k", "layers": 1},
        train={"lr": 0.05, "batch_size": 3, "dropout": 0.0}, federation={"clients": 2, "rounds": 3},
        personal={"keep": "head", "head_epochs": 2}, **tables,
    )  # fmt: skip


def test_fedrep_trains_the_head_alone_and_then_the_rest_alone() -> None:
    """Collins et al. 2021, with torch's own gradients, written out."""
    setting, round = fedrep(), 3
    clients = Clients(setting)
    learner, shard, name = clients.learner, clients.train("client-0000"), "client-0000"
    head, start = learner.client_tensors.keys(), {**learner.initial(), **learner.client_tensors}
    request = TrainRequest(setting.canonical, "", round, learner.data_info, start)
    update = train_fedrep(learner, request, start, name, shard)
    trainable.load_values(learner.model, start)
    trainable.training_mode(learner.model)
    parameters = trainable.trainable(learner.model)
    longer = setting.model_copy(update={"train": setting.train.model_copy(update={"epochs": 2})})
    for order, moving in ((longer, head), (setting, parameters.keys() - head)):
        for rows in batches(len(shard), order, round, name):
            outputs = learner.model(learner.collate(shard, rows))
            loss = torch.nn.functional.cross_entropy(outputs, shard.targets_of(rows))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (one, p), gradient in zip(parameters.items(), gradients, strict=True):
                    p -= 0.05 * gradient * (one in moving)
    assert 0 < len(head) < len(parameters)
    for one, p in parameters.items():
        torch.testing.assert_close(start[one] + update.delta[one], p.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(p.detach(), start[one]), one


def test_fedrep_has_the_same_bits_everywhere_and_others_than_fedper(tmp_path: Path) -> None:
    setting = fedrep()
    whole, loop = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="loop")
    again = stopped_and_resumed(setting, tmp_path / "c")
    for other in (loop, again):
        assert (other.model_sha256, other.final) == (whole.model_sha256, whole.final)
    fedper = setting.model_copy(update={"personal": PersonalSection(keep="head")})
    assert run(fedper, tmp_path / "fedper").model_sha256 != whole.model_sha256


def test_epochs_of_the_head_are_for_a_head_that_stays() -> None:
    with pytest.raises(
        ConfigError, match="head_epochs has no meaning with keep = 'mixture', only with 'head'"
    ):
        heads(FEDAVG, personal={"keep": "mixture", "head_epochs": 2})
