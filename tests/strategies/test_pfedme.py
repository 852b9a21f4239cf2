"""pFedMe against its paper's algorithm, written out in NumPy and by a network's steps; and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.training.local_adaptation import adapt_locally
from atoll.client.training.pfedme import MoreauSteps
from atoll.errors import ConfigError
from atoll.protocol.requests import EvaluateRequest
from atoll.server.job_checks import check_named
from atoll.sim.engines.engine import check_engine
from tests.client.state.test_client_state import Array, Softmax, final, heads, matrix
from tests.client.state.test_personal import stopped_and_resumed
from tests.sim.test_simulation import run
from tests.strategies.test_personal_methods import SEEDED, one_step
from tests.support.small import few_pictures, image_job

PFEDME = {"name": "pfedme", "lr": 0.9, "options": {"pull": 1.5, "inner_lr": 0.3, "inner_steps": 3}}
ETA, LAMBDA, ALPHA, K, BETA = 0.5, 1.5, 0.3, 3, 0.9


def test_pfedme_is_algorithm_1_of_its_paper(tmp_path: Path) -> None:
    """T. Dinh et al. 2020, line by line; three of six clients take part in a round."""
    setting = heads(PFEDME)
    result = run(setting, tmp_path)
    problem = Softmax(setting)
    w = problem.start
    for line in result.rounds:
        arrived = []
        for i in line["cohort"]:
            local = w.copy()
            for rows in problem.batches(i, line["round"]):
                theta = local.copy()
                for _ in range(K):
                    theta = theta - ALPHA * (problem.gradient(theta, i, rows) + LAMBDA * (theta - local))
                local = local - ETA * LAMBDA * (local - theta)
            arrived.append(local)
        w = (1 - BETA) * w + BETA * sum(arrived) / len(arrived)
    np.testing.assert_allclose(final(tmp_path, "model/"), w, rtol=0, atol=2e-6)


def test_a_network_moves_towards_where_its_inner_steps_led() -> None:
    """Plain steps from known places make it: theta by three of them with a proximal term, w by their sum."""
    w, moved = one_step(lr=0.1)
    theta = w
    for _ in range(K):  # the delta leads from w; train.lr stands for alpha
        theta = {n: w[n] + d for n, d in moved(begin=theta, plan={"proximal_mu": LAMBDA}).items()}
    for name, delta in moved(moreau=MoreauSteps(LAMBDA, 0.1, K)).items():
        torch.testing.assert_close(delta, -0.1 * LAMBDA * (w[name] - theta[name]), rtol=1e-4, atol=1e-6)
        assert bool(delta.any())


def test_a_clients_own_model_is_measured_and_every_engine_gives_the_same_bits(tmp_path: Path) -> None:
    setting = heads(PFEDME, evaluate={"adapt": 2}, federation={"rounds": 3})
    whole, loop = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="loop")
    again = stopped_and_resumed(setting, tmp_path / "c")
    for other in (loop, again):
        assert (other.model_sha256, other.final) == (whole.model_sha256, whole.final)
    assert "adapted_accuracy" in whole.final["clients"]["client-0000"]


def own_model(setting_steps: int) -> tuple[Array, Array]:
    """(what a client makes of the first model in so many steps, the same in NumPy)."""
    setting = heads(PFEDME)
    problem, name = Softmax(setting), "client-0001"
    w = problem.learner.initial()
    request = EvaluateRequest(setting.canonical, setting.hash, 5, problem.learner.data_info, w)
    found = matrix(adapt_locally(problem.learner, request, name, problem.train(name), setting_steps))
    theta = problem.start
    for rows in problem.batches(name, 6)[:setting_steps]:
        theta = theta - ALPHA * (problem.gradient(theta, name, rows) + LAMBDA * (theta - problem.start))
    return found, theta


@pytest.mark.parametrize("steps", [1, 3])
def test_a_clients_own_model_is_held_to_the_one_of_all(steps: int) -> None:
    found, expected = own_model(steps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_whole_networks_have_the_same_bits_in_worker_processes(tmp_path: Path) -> None:
    setting = image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "full"},
        train={"lr": 0.01, "batch_size": 4, "dropout": 0.0}, strategy={"name": "pfedme"},
        federation={"clients": 2, "quorum": 1.0, "rounds": 1}, evaluate={"adapt": 1},
    )  # fmt: skip
    first, loop = run(setting, tmp_path / "inline"), run(setting, tmp_path / "loop", engine="loop")
    assert (first.model_sha256, first.final) == (loop.model_sha256, loop.final)
    with pytest.raises(ConfigError, match=r"strategy\.name: engine cohort .* without inner steps"):
        check_engine(setting, "cohort")


def test_pfedme_keeps_a_promise_to_clients(tmp_path: Path) -> None:
    """With next to no noise and a wide bound the noised mean is the even mean."""
    tables = {"federation": {"cohort": 3, "rounds": 1}}
    promise = {"noise_multiplier": 1e-6, "clipping_norm": 20.0, "delta": 1e-3, "unit": "client"}
    private = heads(PFEDME, privacy=promise | {"where": "distributed", "seeded_noise": True}, **tables)
    run(private, tmp_path / "private")
    run(heads(PFEDME, **tables), tmp_path / "open")
    noised, plain = (final(tmp_path / name, "model/") for name in ("private", "open"))
    np.testing.assert_allclose(noised, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25}},
         r"strategy\.name: pfedme takes a step's gradients where other steps led, .*'example'"),
        ({"federation": {"secure_aggregation": True}}, "pfedme counts clients evenly"),
        ({"federation": {"concurrency": 4}}, r"strategy\.name: federation\.concurrency lets updates be late"),
        ({"federation": {"weights": "examples"}}, r"federation\.weights: pfedme has a rule of its own"),
        ({"federation": {"selection": "by-size"}}, r"federation\.selection: .* pfedme has a rule of its own"),
        ({"personal": {"keep": "mixture"}}, r"personal\.keep: pfedme makes one model for all to adapt"),
        ({"train": {"precision": "fp16"}}, r"train\.precision: 'fp16' scales gradients, and pfedme"),
        ({"backbone": {"name": "raw:pixels", "image_size": 8, "prune": 0.5}}, r"backbone\.prune: pfedme's"),
    ],
)  # fmt: skip
def test_what_pfedme_can_not_be_exact_with_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        heads(PFEDME, **tables)


@pytest.mark.parametrize("option", ["pull", "inner_lr", "inner_steps"])
def test_an_option_out_of_bounds_is_named(option: str) -> None:
    setting = heads({"name": "pfedme", "options": {option: 0}})
    with pytest.raises(ConfigError, match=rf"strategy\.options\.{option}: expected greater than"):
        check_named(setting)


def test_with_one_inner_step_it_is_gradient_descent_of_another_length(tmp_path: Path) -> None:
    # theta = w - alpha grad f(w), so w moves by eta lambda alpha grad f(w): FedAvg's step, evenly merged
    options = {"pull": 2.0, "inner_lr": 0.25, "inner_steps": 1}
    tables = {"federation": {"rounds": 1}}
    run(heads({"name": "pfedme", "options": options}, **tables), tmp_path / "pfedme")
    train = {"lr": ETA * 2.0 * 0.25, "batch_size": 16, "epochs": 2}
    run(heads({"name": "reptile", "lr": 1.0}, train=train, **tables), tmp_path / "plain")
    found, expected = (final(tmp_path / name, "model/") for name in ("pfedme", "plain"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
