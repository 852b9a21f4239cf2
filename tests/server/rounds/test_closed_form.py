"""Heads in closed form: scikit-learn's, however the examples are dealt, with the same bits everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from atoll.client.heads import statistics as client_statistics
from atoll.client.site import Site
from atoll.errors import ConfigError
from atoll.job.closed_form import statistics_shapes
from atoll.job.job import Job
from atoll.learning.learner import sum_states
from atoll.protocol.messages import Failure, Measurement, Reply
from atoll.protocol.requests import Request, StatisticsRequest, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.closed_form import statistics_size, validate_statistics
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from atoll.strategies import closed_form
from tests.sim.test_simulation import job, run
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

KINDS = ("prototype", "ridge", "gaussian")
FEW: dict[str, Any] = {"rounds": 1, "cohort": 6}


def formed(kind: str, **tables: Any) -> Job:
    return job(tune={"head_init": kind}, federation=FEW | tables.pop("federation", {}), **tables)


def examples(count: int = 60, width: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % classes
    features = torch.randn(count, width, generator=draw) * torch.rand(width, generator=draw) * 3
    features += targets.unsqueeze(1) * torch.rand(width, generator=draw) + 5
    features[:, 2] = 0.1  # a feature that never varies
    return features, targets


def total(kind: str, features: torch.Tensor, targets: torch.Tensor, parts: Sequence[slice]) -> Tensors:
    return sum_states(closed_form.STATISTICS[kind](features[p], targets[p], 4) for p in parts)


WHOLE = [slice(0, 60)]


@pytest.mark.processes
def test_prototypes_decide_as_nearest_centroids_of_standardised_features() -> None:
    features, targets = examples()
    features = features[:, torch.arange(12) != 2]  # scikit-learn warns of features that never vary
    weights, bias = closed_form.prototype_head(total("prototype", features, targets, WHOLE))
    standard = StandardScaler().fit(features.double().numpy())
    x = standard.transform(features.double().numpy())
    oracle = NearestCentroid().fit(x, targets.numpy())
    outputs = features.double() @ weights.T + bias
    assert np.array_equal(outputs.argmax(1).numpy(), oracle.predict(x))
    # outputs are minus the mean squared distances, but for a term that all classes share
    distances = torch.from_numpy(((x[:, None] - oracle.centroids_[None]) ** 2).mean(2))
    apart = outputs + distances
    assert torch.allclose(apart, apart[:, :1].expand(-1, 4), atol=1e-10)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_ridge_is_scikit_learns_whose_penalty_is_in_units_of_the_mean_variance(ridge: float) -> None:
    features, targets = examples()
    weights, bias = closed_form.ridge_head(total("ridge", features, targets, WHOLE), ridge)
    x = features.double().numpy()
    oracle = Ridge(alpha=ridge * len(x) * x.var(0).mean()).fit(x, np.eye(4)[targets.numpy()])
    outputs = features.double() @ weights.T + bias
    assert np.allclose(outputs.numpy(), oracle.predict(x), atol=1e-9)


def test_ridge_takes_fewer_examples_than_features() -> None:
    features, targets = examples(count=6, width=40)
    weights, bias = closed_form.ridge_head(total("ridge", features, targets, [slice(0, 6)]), 0.1)
    x = features.double().numpy()
    oracle = Ridge(alpha=0.6 * x.var(0).mean(), solver="svd").fit(x, np.eye(4)[targets.numpy()])
    assert np.allclose((features.double() @ weights.T + bias).numpy(), oracle.predict(x), atol=1e-9)


@pytest.mark.processes
def test_gaussian_classes_are_scikit_learns_discriminant() -> None:
    features, targets = examples()
    features = features[:, torch.arange(12) != 2]
    weights, bias = closed_form.gaussian_head(total("gaussian", features, targets, WHOLE), 1e-12)
    x = features.double().numpy()
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(x, targets.numpy())
    np.testing.assert_allclose(weights.numpy(), oracle.coef_, rtol=1e-7)
    np.testing.assert_allclose(bias.numpy(), oracle.intercept_, rtol=1e-7)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_gaussian_classes_are_bayes_rule_with_a_larger_covariance(ridge: float) -> None:
    features, targets = examples(count=50)  # classes of 13 and of 12
    weights, bias = closed_form.gaussian_head(total("gaussian", features, targets, [slice(0, 50)]), ridge)
    x, classes = features.double().numpy(), targets.numpy()
    means = np.stack([x[classes == k].mean(0) for k in range(4)])
    within = np.cov((x - means[classes]).T, bias=True)
    within += ridge * within.diagonal().mean() * np.eye(12)
    shares = np.log(np.bincount(classes) / len(classes))
    odds = np.stack([multivariate_normal(mean, within).logpdf(x) for mean in means], 1) + shares
    outputs = (features.double() @ weights.T + bias).softmax(1).numpy()
    np.testing.assert_allclose(outputs, softmax(odds, 1), rtol=1e-7, atol=1e-12)


def test_a_class_without_examples_is_never_predicted_and_part_of_an_example_is_one() -> None:
    features, targets = examples()
    sums = total("gaussian", features, targets.clamp_max(2), WHOLE)
    for of in (closed_form.prototype_head, lambda t: closed_form.gaussian_head(t, 0.1)):
        told = dict(sums, squares=sums["gram"].diagonal())
        weights, bias = of(told)
        assert (features.double() @ weights.T + bias).argmax(1).max() == 2
        scaled = of({name: t / 100 for name, t in told.items()})  # a promise to clients sends means
        for one, other in zip((weights, bias), scaled, strict=True):
            assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_pooled_one_to_float64_whoever_holds_what(kind: str) -> None:
    features, targets = examples()
    order = targets.argsort(stable=True)  # one class a client, and a client with one example
    features, targets = features[order], targets[order]
    of = {
        "prototype": closed_form.prototype_head,
        "ridge": lambda t: closed_form.ridge_head(t, 0.5),
        "gaussian": lambda t: closed_form.gaussian_head(t, 0.5),
    }[kind]
    pooled = of(total(kind, features, targets, WHOLE))
    parts = [slice(0, 15), slice(15, 16), slice(16, 30), slice(30, 45), slice(45, 60)]
    dealt = of(total(kind, features, targets, parts))
    for one, other in zip(pooled, dealt, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


def dealt(partition: str, targets: torch.Tensor) -> list[list[int]]:
    """Rows of each of five clients."""
    draw = np.random.default_rng(7)
    if partition == "iid":
        return [rows.tolist() for rows in np.array_split(draw.permutation(len(targets)), 5)]
    if partition == "one class a client":
        return [(targets == k).nonzero().flatten().tolist() for k in range(4)]
    if partition == "a client without examples":
        return [*dealt("iid", targets)[:4], [], dealt("iid", targets)[4]]
    clients: list[list[int]] = [[] for _ in range(5)]
    for k in range(4):
        rows = (targets == k).nonzero().flatten().numpy()
        cuts = (np.cumsum(draw.dirichlet([0.05] * 5))[:-1] * len(rows)).astype(int)
        for client, part in zip(clients, np.split(rows, cuts), strict=True):
            client += part.tolist()
    return clients


@pytest.mark.parametrize(
    "partition", ["iid", "Dirichlet 0.05", "one class a client", "a client without examples"]
)
def test_the_ridge_head_of_any_partition_solves_the_pooled_equations(partition: str) -> None:
    """By what clients send and the server adds up, beside NumPy on all examples in one place."""
    setting, (features, targets) = formed("ridge"), examples(400)
    learner: Any = SimpleNamespace(
        job=setting, data_info={"classes": list("abcd")}, features=SimpleNamespace(plain=lambda s: s.rows)
    )
    rows = {f"client-{n}": Dealt(features[r], targets[r]) for n, r in enumerate(dealt(partition, targets))}
    replies = client_statistics.statistics(learner, 1, cast(Any, rows))
    screened = validate_statistics(replies, sorted(rows), setting, {"head.weight": torch.zeros(4, 12)})
    without = {name for name, shard in rows.items() if not len(shard)}
    assert set(screened.set_aside) == without  # they have nothing to add
    weights, bias = closed_form.ridge_head(screened.statistics, 0.5)
    x, y = features.double().numpy(), np.eye(4)[targets]
    centred, cost = x - x.mean(0), 0.5 * x.var(0).mean()
    solved = np.linalg.solve(centred.T @ centred / 400 + cost * np.eye(12), centred.T @ (y - y.mean(0)) / 400)
    assert np.linalg.norm(weights.numpy() - solved.T) <= 1e-9 * np.linalg.norm(solved)
    offset = y.mean(0) - x.mean(0) @ solved
    assert np.linalg.norm(bias.numpy() - offset) <= 1e-9 * np.linalg.norm(offset)


class Dealt:
    """A shard of features and classes."""

    def __init__(self, rows: torch.Tensor, table: torch.Tensor) -> None:
        self.rows, self.table = rows, table

    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_nobody_has_is_never_predicted(kind: str) -> None:
    features, targets = examples(classes=3)
    head = closed_form.head_of(kind, total(kind, features, targets, WHOLE), 1.0)
    outputs = features @ head["head.weight"].T + head["head.bias"]
    assert torch.isfinite(outputs).all() and 3 not in outputs.argmax(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_round_has_the_same_bits_everywhere_and_beats_chance(tmp_path: Path, kind: str) -> None:
    setting = formed(kind)
    results = [
        run(setting, tmp_path / str(number), **options)
        for number, options in enumerate(({}, {"engine": "loop"}, {"workers": 3}))
    ]
    assert len({r.model_sha256 for r in results}) == 1
    assert results[0].final["server"]["accuracy"] > 0.3  # of ten classes, on random features
    [line] = results[0].rounds
    assert line["loss"] is None and line["trained"] == 6 and not line["set_aside"]
    model = {"head.weight": torch.zeros(10, 512)}
    assert results[0].bytes_up == 6 * statistics_size(setting, model)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ray_has_the_bits_of_one_process(tmp_path: Path, kind: str) -> None:
    setting = formed(kind, federation={"rounds": 2})
    inline, ray = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="ray", workers=2)
    assert inline.model_sha256 == ray.model_sha256


def test_later_rounds_train_from_the_formed_head_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    setting = formed("prototype", federation={"rounds": 3, "cohort": 4})
    whole = run(setting, tmp_path / "whole")
    assert len({line["model_sha256"] for line in whole.rounds}) == 3
    assert whole.rounds[1]["loss"] < math.log(10)

    class Stopped(Exception): ...

    class Stops(InlineTransport):
        def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Any:
            if isinstance(request, TrainRequest) and request.round == 2:
                raise Stopped
            return super().send_and_receive(request, names, timeout)

    from atoll.server.run.run_job import run_job
    from atoll.sim.engines.engine import cached_test_set

    population = Population.of(setting)
    with pytest.raises(Stopped):
        run_job(setting, Stops.of(population), tmp_path / "r", cached_test_set(population, None))
    again = run(setting, tmp_path / "r", resume=True)
    assert [r["model_sha256"] for r in again.rounds] == [r["model_sha256"] for r in whole.rounds]


def statistics(**changes: torch.Tensor) -> Tensors:
    form = statistics_shapes(formed("prototype"), 10, 4)
    return {name: torch.ones(shape, dtype=torch.float64) for name, shape in form.items()} | changes


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Measurement("a", 1, 5, statistics(sums=torch.full((10, 4), math.nan).double())), "not finite"),
        (Measurement("a", 1, 5, statistics(counts=torch.zeros(10).double())), "statistics of 0 examples"),
        (Measurement("a", 1, 5, statistics(counts=-torch.ones(10).double())), "statistics of -10 examples"),
        (Measurement("a", 1, 5, statistics(sums=torch.ones(10, 4))), "in float64, found"),
        (Measurement("a", 1, 5, statistics(sums=torch.ones(9, 4).double())), "expected .*found"),
        (Measurement("a", 2, 5, statistics()), "of round 2, expected statistics of round 1"),
        (Failure("a", "ill"), "ill"),
    ],
)
def test_statistics_that_cannot_be_are_set_aside_by_their_clients_name(reply: Reply, why: str) -> None:
    model = {"head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    replies = [reply, Measurement("b", 1, 5, statistics()), Measurement("b", 1, 5, statistics())]
    screened = validate_statistics(replies, ["a", "b", "c"], formed("prototype"), model)
    assert screened.num_valid == 1 and set(screened.set_aside) == {"a", "b (again)", "c"}
    import re

    assert re.search(why, screened.set_aside["a"])
    assert torch.equal(screened.statistics["counts"], torch.ones(10).double())


def test_a_real_site_gives_no_statistics_to_a_job_that_forms_no_head() -> None:
    setting = job()
    population = Population.of(setting)
    data_info = population.roster(setting).data_info[0]
    request = StatisticsRequest(setting.canonical, setting.hash, 1, data_info)
    [reply] = Site(population, discreet=True).answer(request, ["client-0000"])
    assert reply == Failure("client-0000", "its job forms no head of statistics")


PROMISE = {"epsilon": 1.0, "delta": 1e-4}
NORM = {"tune": {"head_init": "ridge", "feature_norm": 1.0}}


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        (
            {"privacy": {"unit": "both", "example": PROMISE, "client": PROMISE}} | NORM,
            "privacy.unit: expected 'example' or 'client' with tune.head_init, found 'both'",
        ),
        ({"federation": {"secure_aggregation": True}}, "expected none with federation.secure_aggregation"),
        ({"train": {"teacher": "x"}}, "expected none with train.teacher"),
        ({"tune": {"head_init": "ridge", "method": "full"}}, "found tune.method = 'full'"),
        (
            {"tune": {"head_init": "prototype", "ridge": 1.0}},
            "tune.ridge has no meaning with head_init = 'prototype', only with 'ridge' or 'gaussian'",
        ),
    ],
)
def test_where_a_closed_form_makes_no_sense_it_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        job(**{"tune": {"head_init": "ridge"}} | tables)


def test_a_task_without_classes_on_features_refuses_it(tmp_path: Path) -> None:
    from atoll.server.run.run_job import validate_job

    base = ready(job_of("forecasting", "head"), tmp_path)
    with pytest.raises(ConfigError, match=r"tune\.head_init: forecasting has no head of classes"):
        validate_job(base.model_copy(update={"tune": base.tune.model_copy(update={"head_init": "ridge"})}))
