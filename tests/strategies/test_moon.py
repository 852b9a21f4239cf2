"""MOON: its loss by other means, its first round as FedAvg's, engines, kills, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.training.batches import batches
from atoll.client.training.local_sgd import train_model
from atoll.client.training.moon import ModelContrast, contrast
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.server.job_checks import check_named
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.engines.engine import check_engine
from atoll.tasks import task_named
from tests.client.state.test_client_state import Clients, heads
from tests.client.state.test_personal import stopped_and_resumed
from tests.sim.test_simulation import run
from tests.strategies.test_fair_strategies import EXAMPLE
from tests.support.small import few_pictures, image_job

MOON = {"name": "moon", "options": {"mu": 2.0, "temperature": 0.3}}


def network(strategy: dict[str, Any] = MOON, **tables: Any) -> Job:
    train = {"lr": 0.05, "batch_size": 4, "dropout": 0.0} | tables.pop("train", {})
    federation = {"clients": 2, "quorum": 1.0, "rounds": 3} | tables.pop("federation", {})
    return image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), train=train, strategy=strategy,
        federation=federation, **{"tune": {"method": "last-k", "layers": 1}} | tables,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_contrast_is_the_formula_of_the_paper(temperature: float) -> None:
    """Li et al. 2021, equation 3, in NumPy."""
    z, z_glob, z_prev = np.random.default_rng(3).normal(size=(3, 5, 7))

    def similar(a: Any, b: Any) -> Any:
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    near, far = (np.exp(similar(z, other) / temperature) for other in (z_glob, z_prev))
    expected = np.mean(-np.log(near / (near + far)))
    found = contrast(*(torch.from_numpy(one) for one in (z, z_glob, z_prev)), temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_local_steps_go_down_the_loss_with_the_contrast() -> None:
    """Every batch of a round by autograd on three networks of their own."""
    setting, name = network(), "client-0001"
    clients = Clients(setting)
    learner, shard = clients.learner, clients.train(name)
    w = learner.initial()
    draw = torch.Generator().manual_seed(4)
    previous = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in w.items()}
    given = ModelContrast(w, previous, 2.0, 0.3)
    update = train_model(learner, w, shard, setting, client=name, round=2, plan={}, contrast=given)
    nets = []
    for tensors in (w, w, previous):
        nets.append(deepcopy(learner.model).eval())
        trainable.load_values(nets[-1], tensors)
    own, received, last = nets
    parameters, losses = trainable.trainable(own), 0.0
    for rows in batches(len(shard), setting, 2, name):
        batch = learner.collate(shard, rows)
        z = own.backbone(batch)
        with torch.no_grad():
            z_glob, z_prev = received.backbone(batch), last.backbone(batch)
        supervised = torch.nn.functional.cross_entropy(own.head(z), shard.targets[torch.tensor(rows)])
        both = [torch.cosine_similarity(z, other) / 0.3 for other in (z_glob, z_prev)]
        apart = -(both[0] - torch.logsumexp(torch.stack(both), dim=0)).mean()
        gradients = torch.autograd.grad(supervised + 2.0 * apart, list(parameters.values()))
        losses += float(supervised) * len(rows)
        with torch.no_grad():
            for p, gradient in zip(parameters.values(), gradients, strict=True):
                p -= 0.05 * gradient
    for n, p in parameters.items():
        torch.testing.assert_close(update.delta[n], p.detach() - w[n], rtol=1e-3, atol=1e-5)
    assert float(update.states["train_loss.sum"]) == pytest.approx(losses, rel=1e-4)
    plain = train_model(learner, w, shard, setting, client=name, round=2, plan={})
    assert any(not torch.allclose(plain.delta[n], d, atol=1e-4) for n, d in update.delta.items())


@pytest.mark.parametrize("method", ["last-k", "lora"])
def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path: Path, method: str) -> None:
    tune = {"method": method} | ({"layers": 1} if method == "last-k" else {})
    setting = network(tune=tune)
    whole = run(setting, tmp_path / "whole")
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole.model_sha256
    assert stopped_and_resumed(setting, tmp_path / "r").model_sha256 == whole.model_sha256
    plain = run(network({"name": "fedavg"}, tune=tune), tmp_path / "plain")
    hashes = [[line["model_sha256"] for line in one.rounds] for one in (whole, plain)]
    # Nobody has a last model in the first round, which is FedAvg's; from then on it tells.
    assert hashes[0][0] == hashes[1][0] and hashes[0][1] != hashes[1][1]


def test_compressed_updates_leave_a_clients_memory_to_its_last_model(tmp_path: Path) -> None:
    """Once they took its place, and what was called MOON was FedAvg."""
    federation = {"compression": "int8", "error_feedback": False}
    hashes = {}
    for name, strategy in {"moon": MOON, "fedavg": {"name": "fedavg"}}.items():
        result = run(network(strategy, federation=federation), tmp_path / name)
        hashes[name] = [line["model_sha256"] for line in result.rounds]
    assert hashes["moon"][0] == hashes["fedavg"][0]
    assert hashes["moon"][1] != hashes["fedavg"][1] and hashes["moon"][2] != hashes["fedavg"][2]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"tune": {"method": "head"}}, r"tune\.method: moon moves the representation before the head"),
        ({"privacy": EXAMPLE}, r"strategy\.name: moon's updates depend on a model that clients keep"),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}},
         r"strategy\.name: expected one of fedavg, .*, found 'moon'"),
        ({"federation": {"clients": 3, "secure_aggregation": True}},
         r"strategy\.name: expected one of fedavg, .*, found 'moon'"),
        ({"federation": {"concurrency": 2}}, r"strategy\.name: federation\.concurrency lets updates be late"),
        ({"federation": {"compression": "int8"}}, r"federation\.error_feedback: .* its last model"),
        ({"personal": {"keep": "norms"}}, r"personal\.keep: .* the one model that all share"),
    ],
)  # fmt: skip
def test_what_moon_has_no_meaning_with_is_refused_by_name(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        network(**tables)


def test_other_engines_tasks_and_attacks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="engine cohort trains such clients without a contrast"):
        check_engine(network(), "cohort")
    with pytest.raises(ConfigError, match=r"strategy\.name: a run with it can't be attacked"):
        job_to_replay(network())
    with pytest.raises(ConfigError, match=r"strategy\.options\.temperature: expected greater than 0"):
        check_named(network({"name": "moon", "options": {"temperature": 0}}))
    tables = network().model_dump(mode="json") | {"task": {"name": "segmentation"}}
    with pytest.raises(ConfigError, match="segmentation has no head on features"):
        Learner.of(Job.parse(tables, origin="test"), task_named("segmentation"), {})
    with pytest.raises(ConfigError, match=r"tune\.method: moon"):
        heads(MOON)
