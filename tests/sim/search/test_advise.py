"""Ranking backbones: LogME against the evidence itself, the probe, and what may be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

import atoll
from atoll.cli.main import run as command_line
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.sim.population.population import Population
from atoll.sim.search.backbone_ranking import Sample, advise, candidates_here, probe_accuracy, sampled
from atoll.sim.search.logme import logme
from atoll.tasks import task_named
from tests.sim.search.test_tune import base_of, job_file, job_of


def evidence(features: Any, y: Any, alpha: float, beta: float) -> float:
    """log p(y) where y = F w + noise: a normal density with covariance F F^T / alpha + I / beta."""
    covariance = features @ features.T / alpha + np.eye(len(y)) / beta
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


def best_evidence(features: Any, y: Any) -> float:
    """The same at its best alpha and beta, found by a search that knows nothing of fixed points."""
    starts = [(a, b) for a in (-3.0, 0.0, 3.0) for b in (-3.0, 0.0, 3.0)]
    found = [
        minimize(
            lambda logs: -evidence(features, y, *np.exp(np.clip(logs, -15, 15))), start, method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 4000},
        ).fun
        for start in starts
    ]  # fmt: skip
    return -float(min(found))


@pytest.mark.parametrize(("n", "width"), [(40, 3), (30, 30), (25, 60)], ids=["tall", "square", "wide"])
def test_logme_is_the_mean_over_classes_of_the_best_evidence_an_example(n: int, width: int) -> None:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 3, n)
    features = rng.normal(size=(n, width)) + rng.normal(size=(3, width))[labels]
    expected = np.mean([best_evidence(features, (labels == c).astype(float)) for c in range(3)]) / n
    assert logme(features.astype(np.float32), labels) == pytest.approx(expected, abs=2e-4)


def test_logme_is_higher_for_features_that_tell_classes_apart_and_blind_to_classes_without_examples() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    noise = rng.normal(size=(200, 10))
    scores = [logme(noise + strength * np.eye(10)[labels], labels) for strength in (0.0, 1.0, 3.0)]
    assert scores == sorted(scores) and scores[2] > scores[0] + 0.1
    # A third fewer classes, with other numbers: the same problem.
    assert logme(noise, labels * 7) == logme(noise, labels)


def test_the_probe_counts_what_it_gets_right_on_examples_it_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    labels, true = rng.integers(0, 3, 300), rng.integers(0, 3, 300)
    clear = probe_accuracy(np.eye(3)[labels], labels, np.eye(3)[true], true)
    blind = probe_accuracy(rng.normal(size=(300, 3)), labels, rng.normal(size=(300, 3)), true)
    assert clear == 1.0 and abs(blind - 1 / 3) < 0.12
    assert probe_accuracy(np.ones((4, 2)), np.zeros(4, int), np.ones((4, 2)), np.array([0, 0, 1, 2])) == 0.5


def learner_of(job: Job) -> tuple[Population, Learner]:
    population, task = Population.of(job), task_named(job.task.name)
    return population, Learner.of(job, task, task.merge_info(population.roster(job).data_info))


def test_the_sample_is_what_clients_train_on_and_keep_back_and_never_the_test_set() -> None:
    job = job_of(base_of(), {})
    population, learner = learner_of(job)
    whole, held_out = population.whole(learner), set(task_named(job.task.name).keys(population.test))
    everything = sampled(population, learner, 10_000)
    parts = [{whole.keys[row] for row in rows} for rows in (everything.train, everything.held_out)]
    assert len(parts[0] | parts[1]) == len(whole) and not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & held_out
    # Each example is kept back with a probability of a fifth: four deviations around it.
    assert len(everything.held_out) == pytest.approx(len(whole) / 5, abs=4 * (len(whole) * 0.2 * 0.8) ** 0.5)
    few = sampled(population, learner, 50)
    assert len(few.train) == len(few.held_out) == 50 and set(few.train) <= set(everything.train)
    again: Sample = sampled(population, learner, 50)
    assert (few.train == again.train).all() and (few.held_out == again.held_out).all()


def test_clients_that_share_examples_keep_back_none_that_another_trains_on() -> None:
    job = job_of(base_of(data={"partition": {"kind": "resampled", "examples": 40}}), {})
    population, learner = learner_of(job)
    sample = sampled(population, learner, 10_000)
    assert len(sample.held_out) and not set(sample.train) & set(sample.held_out)


def test_candidates_are_the_jobs_own_first_and_only_those_whose_weights_are_here() -> None:
    job = job_of(base_of(backbone={"name": "torchvision:squeezenet1_1", "weights": "random"}), {})
    found = candidates_here(job)
    assert found[0] == "torchvision:squeezenet1_1" and "raw:pixels" in found
    assert len(found) == len(set(found)) and "torchvision:vgg19" not in found


def test_backbones_are_ranked_and_what_does_not_fit_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job_file(tmp_path, backbone={"name": "raw:pixels", "image_size": 32})
    names = "raw:pixels,atoll:small-text"
    given = ["advise", str(path), "--head", "200", "--backbones", names]
    assert command_line([*given, "--set", "train.lr=0.5"]) == 2  # atoll:small-text has no weights
    assert "nobody has trained atoll:small-text" in capsys.readouterr().err
    assert command_line([*given[:-2], "--backbones", "raw:pixels", "--set", "train.lr=0.5"]) == 0
    said = capsys.readouterr().out
    assert "raw:pixels" in said and "--set backbone.name=raw:pixels --set train.lr=0.5" in said
    [advice] = atoll.advise(path, ["raw:pixels"], head=200)
    assert advice.width == 3 * 32 * 32 and advice.parameters == 0 and advice.seconds > 0
    # Ten balanced digits, 200 examples: far above chance, and as good as a probe of pixels gets.
    assert 0.7 < advice.probe <= 1
    left: list[str] = []
    found = advise(
        job_of(base_of(backbone={"offline": True}), {}), ["hf:no/such", "raw:pixels"], head=100,
        left_out=lambda name, why: left.append(f"{name}: {why}"),
    )  # fmt: skip
    assert [one.backbone for one in found] == ["raw:pixels"] and left[0].startswith("hf:no/such: ")


@pytest.mark.parametrize(
    ("tables", "arguments", "pattern"),
    [
        ({"task": {"name": "forecasting"}}, [], "task.name: backbones are ranked for classification"),
        (
            {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}},
            [],
            "privacy.unit: backbones are ranked by data that is promised privacy",
        ),
        ({"data": {"validation_fraction": 0.0}}, [], "data.validation_fraction: clients keep nothing back"),
        ({}, ["--backbones", "raw:pixels,"], "--backbones: expected names between commas"),
        ({}, ["--backbones", "torchvision:mobilnet_v2"], "torchvision has no model 'mobilnet_v2'"),
        ({}, ["--head", "1"], "'--head': 1 is not in the range"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tables: dict[str, Any],
    arguments: list[str],
    pattern: str,
) -> None:
    assert command_line(["advise", str(job_file(tmp_path, **tables)), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and pattern in line, line
