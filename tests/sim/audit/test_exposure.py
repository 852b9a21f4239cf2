"""Exposure of planted secrets: ranks by brute force, and models that have seen them or haven't."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.audit.exposure import (
    OTHERS,
    PLANTED,
    RANKED,
    Boxes,
    PlantedIndex,
    PlantedTexts,
    expected_of_unknown,
    exposed,
    exposure,
    exposures,
    surprises,
    told_in,
)
from atoll.sim.audit.replay import fresh_learner
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from tests.support.models import byte_tokenizer, small_llama

PRIVATE = {
    "unit": "example", "noise_multiplier": 4.0, "clipping_norm": 0.1, "delta": 1e-3, "sampling_rate": 0.5,
    "seeded_noise": True,
}  # fmt: skip


@cache
def llama() -> TemporaryDirectory[str]:
    """A network that no test changes; its folder goes when the tests are over."""
    folder = TemporaryDirectory(prefix="llama-")
    small_llama(Path(folder.name), tied=False)
    return folder


def job_of(folder: Path, **tables: Any) -> Job:
    """Two clients with six short texts each, two rounds, and a model that learns fast."""
    rows = [{"text": f"we have {n} boats at sea", "who": "ab"[n % 2]} for n in range(12)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table: dict[str, Any] = {
        "name": "boxes",
        "seed": 5,
        "task": {"name": "language-modeling", "options": {"max_tokens": 64, "samples": 0}},
        "data": {
            "source": str(folder / "texts.jsonl"),
            "partition": {"kind": "natural", "by": "who"},
            "validation_fraction": 0,
            "test_fraction": 0,
        },
        "backbone": {"name": llama().name, "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 0.02, "batch_size": 8, "optimizer": "adam", "epochs": 6},
        "federation": {"clients": 2, "rounds": 2},
    }
    return Job.parse({**table, **tables}, origin="test")


def silent(done: int, total: int) -> None:
    """Watches nothing."""


# Ranks


def test_the_expected_exposure_is_the_mean_over_all_ranks() -> None:
    for count in (2, 7, RANKED):
        # Every rank from 1 to the count alike.
        by_rank = [math.log2(count) - math.log2(rank) for rank in range(1, count + 1)]
        assert expected_of_unknown(count) == pytest.approx(sum(by_rank) / count, rel=1e-12)
    assert expected_of_unknown(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)


def test_secrets_of_a_box_differ_and_depend_on_the_seed_alone() -> None:
    boxes = Boxes.of(5)
    assert len(boxes.secrets) == PLANTED + OTHERS and boxes == Boxes.of(5) != Boxes.of(6)
    for secrets in boxes.secrets:
        assert len(set(secrets)) == RANKED and all(0 <= secret < 10**6 for secret in secrets)
    own = boxes.rows(("text",), [1], is_own=True)
    assert own == [{"text": f"The code of box 2 is {boxes.secrets[1][0]:06d}."}]


def unigram(learner: Learner) -> tuple[dict[str, torch.Tensor], np.ndarray[Any, Any]]:
    """(tensors of a network that says the same of every next token, -log p of each token in float64)."""
    draw, tensors = torch.Generator().manual_seed(1), dict(learner.initial())
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = torch.ones_like(tensor)  # so that every state is one vector of ones
        elif "o_proj" in name or "down_proj" in name:
            tensors[name] = torch.zeros_like(tensor)
        elif "norm" in name:
            tensors[name] = torch.ones_like(tensor)
        elif name.startswith("head") or "lm_head" in name:
            tensors[name] = torch.randn(tensor.shape, generator=draw) / 4
            scores = tensors[name].double().sum(1).numpy()
    return tensors, np.log(np.exp(scores).sum()) - scores


def test_exposure_is_by_ranks_that_brute_force_finds_where_likelihoods_are_known(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    learner, boxes, tokenizer = fresh_learner(job, Population.of(job)), Boxes.of(job.seed), byte_tokenizer()
    rows = boxes.rows(("text",), range(PLANTED + OTHERS), is_own=False)
    tensors, costs = unigram(learner)
    shard = told_in(learner, rows)
    by_hand = np.array(
        [sum(costs[token] for token in [*tokenizer(row["text"])["input_ids"][1:], 2]) for row in rows]
    )
    assert surprises(learner, shard, tensors) == pytest.approx(by_hand, rel=1e-5)
    found = exposures(learner, shard, tensors)
    compared = 0
    for bits, (own, *others) in zip(
        found["planted"] + found["others"], by_hand.reshape(-1, RANKED).tolist(), strict=True
    ):
        rank = 1 + sum(other < own for other in others)
        if min(abs(other - own) for other in others) > 1e-4:  # the same digits in another order tie
            assert bits == pytest.approx(math.log2(RANKED / rank))
            compared += 1
    assert compared > len(found["planted"])
    assert exposure(np.array([3.0, 3.0, 1.0, 5.0])) == pytest.approx(math.log2(4 / 3))  # a tie counts


# Runs


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a b"},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_secrets_are_planted_in_the_form_of_the_data_at_one_client(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    job = job_of(tmp_path)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({**row, "who": who}) for who in "aabb"))
    job = job.model_copy(update={"task": job.task.model_copy(update={"options": {"max_tokens": 128}})})
    population = Population.of(job)
    learner = fresh_learner(job, population)
    texts = told_in(learner, Boxes.of(1).rows(tuple(row), [0, 1], is_own=True) * 3)
    index = PlantedIndex(population, learner, planted=PlantedTexts(population, texts, "client-0001"))
    plain = index.population.whole(learner)
    (one, _), (other, _) = index.splits([0, 1])
    assert len(one) + len(other) == len(plain) + 6 and max(one) < len(plain)
    held = index.full_population.select(other.tolist())
    assert len(set(texts.keys)) == len(texts) == 6
    said = [byte_tokenizer().decode(found["input_ids"][found["places"] + 1]) for found in held.inputs]
    assert sum("The code of box 1 is" in text or "he code of box 1 is" in text for text in said) == 3


def test_what_was_planted_often_is_exposed_and_what_never_was_is_not(tmp_path: Path) -> None:
    job, steps = job_of(tmp_path), []
    population = Population.of(job)
    found = exposed(job, population, 16, lambda done, total: steps.append((done, total)))
    assert found is not None and steps == [(1, 2), (2, 2)] and found["unprotected"] is None
    after, before = found["after"], found["before"]
    assert np.mean(after["planted"]) > 5 and max(after["planted"]) == found["at_most"] == 8
    # Four of a distribution of mean 1.4 and deviation 1.4 (that of an exponential, in bits).
    for others in (before["planted"], before["others"], after["others"]):
        assert np.mean(others) < 1.44 + 4 * 1.44 / 2


def test_noise_hides_what_is_exposed_without_it(tmp_path: Path) -> None:
    train = {"lr": 0.02, "batch_size": 8, "optimizer": "adam", "epochs": 6}
    job = job_of(tmp_path, privacy=PRIVATE, train=train)
    found = exposed(job, Population.of(job), 16, silent)
    assert found is not None
    # Of four that aren't exposed a mean of 6 bits or more comes up once in 17,000 times.
    assert np.mean(found["unprotected"]["planted"]) > 6 > np.mean(found["after"]["planted"])


def test_jobs_in_which_nothing_can_be_planted(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    population = Population.of(job)
    assert exposed(job, population, 0, silent) is None
    other = job.model_copy(update={"task": job.task.model_copy(update={"name": "preference"})})
    assert exposed(other, population, 8, silent) is None
    short = job.model_copy(update={"task": job.task.model_copy(update={"options": {"max_tokens": 16}})})
    with pytest.raises(ConfigError, match=r"task.options.max_tokens: 16, too few") as error:
        exposed(short, population, 8, silent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            {"tune": {"method": "head", "then": [{"after": 1, "method": "full"}]}},
            r"tune\.then: a run with it",
        ),
        (
            {"strategy": {"name": "scaffold"}, "train": {"lr": 0.1, "optimizer": "sgd"}},
            r"strategy\.name: .* 'scaffold'",
        ),
    ],
)
def test_jobs_that_can_not_be_played_again_say_why(tmp_path: Path, tables: dict[str, Any], said: str) -> None:
    job = job_of(tmp_path, **tables)
    with pytest.raises(ConfigError, match=said) as error:
        exposed(job, Population.of(job), 8, silent)
    assert "\n" not in str(error.value)


def test_the_verb_shows_it_and_says_why_where_it_can_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tokens in (("long", 64), ("short", 16)):
        (tmp_path / name).mkdir()
        options = {"max_tokens": tokens, "samples": 0}
        job = job_of(
            tmp_path / name, task={"name": "language-modeling", "options": options},
            train={"lr": 0.01, "optimizer": "adam"},
        )  # fmt: skip
        simulate(job, tmp_path / name / "run", on_event=ignore_events, report=False)
    capsys.readouterr()
    assert command_line(["audit", str(tmp_path / "long" / "run"), "--planted", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "long" / "run" / "audit.json").read_text())["exposure"]
    assert found["times"] == 2 and found["secrets"] == 10**6
    again = Job.load(tmp_path / "long" / "run" / "job.toml")
    assert found == exposed(again, Population.of(again), 2, silent)
    assert "each 2 times in texts of client-0000; at most 8, and 1.42 on average" in said
    assert "before training" in said and "without privacy" not in said
    assert command_line(["audit", str(tmp_path / "short" / "run")]) == 0
    assert "no secrets planted: task.options.max_tokens: 16, too few" in capsys.readouterr().out
