"""Closed forms on random features: NumPy's pooled head on the map written out; forgotten and noised too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atoll import Run
from atoll.client.heads import statistics as client_statistics
from atoll.job.job import Job
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.closed_form import solve_head, statistics_size, validate_statistics
from atoll.server.run.forget import forget
from atoll.strategies import closed_form
from atoll.strategies.random_features import random_features, with_last_layer
from atoll.trained import trained
from tests.privacy import detectors
from tests.privacy.runs import test_private_closed_form as private
from tests.server.rounds.test_closed_form import KINDS, Dealt, dealt, examples
from tests.server.run.test_forget import model_without
from tests.sim.test_simulation import DIGITS, run

UNITS = 24


def job(kind: str = "ridge", **tables: Any) -> Job:
    wanted: dict[str, Any] = {
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "tune": {"head_init": kind, "hidden": UNITS, "ridge": 0.1},
        "federation": {"clients": 6, "rounds": 1},
    }
    if kind == "prototype":
        wanted["tune"].pop("ridge")
    return Job.parse(DIGITS | wanted | tables, origin="test")


def drawn(width: int = 12) -> Tensors:
    """A head with a hidden layer, as the seed might draw it."""
    layers = {"0": torch.nn.Linear(width, UNITS), "2": torch.nn.Linear(UNITS, 4)}
    generator = torch.Generator().manual_seed(11)
    return {
        f"head.{at}.{name}": torch.randn(p.shape, generator=generator) / math.sqrt(width)
        for at, layer in layers.items()
        for name, p in layer.named_parameters()
    }


def by_hand(features: np.ndarray, model: Tensors) -> np.ndarray:
    """h(x), unit by unit, in float64."""
    weight, bias = (model[f"head.0.{part}"].numpy().astype(np.float64) for part in ("weight", "bias"))
    columns = [(features * row).sum(1) + b for row, b in zip(weight, bias, strict=True)]
    return np.maximum(np.stack(columns, 1), 0)


def pooled(x: np.ndarray, classes: np.ndarray, count: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [classes, units] and bias of ridge regression on all examples in one place."""
    y = np.eye(count)[classes]
    centred, cost = x - x.mean(0), ridge * x.var(0).mean()
    left = centred.T @ centred / len(x) + cost * np.eye(x.shape[1])
    weights = np.linalg.solve(left, centred.T @ (y - y.mean(0)) / len(x)).T
    return weights, y.mean(0) - weights @ x.mean(0)


def learner_of(setting: Job, model: Tensors, classes: Sequence[str]) -> Any:
    """Stands in for a learner whose features are the shard's own."""
    return SimpleNamespace(
        job=setting,
        data_info={"classes": list(classes)},
        features=SimpleNamespace(plain=lambda s: s.rows),
        initial=lambda: model,
    )


@pytest.mark.parametrize(
    "partition", ["iid", "Dirichlet 0.05", "one class a client", "a client without examples"]
)
def test_any_partition_gives_the_pooled_head_on_the_map_written_out(partition: str) -> None:
    setting, model, (features, targets) = job(), drawn(), examples(400)
    rows = {f"client-{n}": Dealt(features[r], targets[r]) for n, r in enumerate(dealt(partition, targets))}
    learner = learner_of(setting, model, "abcd")
    replies = client_statistics.statistics(learner, 1, cast(Any, rows))
    screened = validate_statistics(replies, sorted(rows), setting, model)
    assert set(screened.set_aside) == {name for name, shard in rows.items() if not len(shard)}
    weights, bias = closed_form.ridge_head(screened.statistics, 0.1)
    expected, offset = pooled(by_hand(features.double().numpy(), model), targets.numpy(), 4, 0.1)
    assert np.linalg.norm(weights.numpy() - expected) <= 1e-9 * np.linalg.norm(expected)
    assert np.linalg.norm(bias.numpy() - offset) <= 1e-9 * np.linalg.norm(offset)
    whole = with_last_layer(model, solve_head(setting, screened.statistics))
    assert torch.equal(whole["head.2.weight"], weights.float())
    assert torch.equal(whole["head.0.weight"], model["head.0.weight"]) and whole.keys() == model.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_same_bits_everywhere_and_its_layer_is_the_seeds(tmp_path: Path, kind: str) -> None:
    setting = job(kind)
    options: Sequence[dict[str, Any]] = ({}, {"engine": "loop"}, {"workers": 2})
    results = [run(setting, tmp_path / str(n), **one) for n, one in enumerate(options)]
    assert len({r.model_sha256 for r in results}) == 1
    learner, model = trained(tmp_path / "0")
    initial = learner.initial()
    assert all(torch.equal(model[n], initial[n]) for n in ("head.0.weight", "head.0.bias"))
    assert not torch.equal(model["head.2.weight"], initial["head.2.weight"])
    assert results[0].bytes_up == 6 * statistics_size(setting, model)
    other = run(job(kind, seed=5), tmp_path / "other")
    assert other.model_sha256 != results[0].model_sha256


def test_it_decides_better_than_the_linear_head_and_predicts_by_the_formula(tmp_path: Path) -> None:
    from atoll.data.images import image_bytes
    from atoll.datasets.registry import load_source

    tune = {"head_init": "ridge", "hidden": 400, "ridge": 0.01}
    found = run(job(tune=tune), tmp_path / "run").final["server"]["accuracy"]
    linear = run(job(tune={"head_init": "ridge", "ridge": 0.01}), tmp_path / "linear")
    assert found > linear.final["server"]["accuracy"] + 0.02
    picture = tmp_path / "one.png"
    picture.write_bytes(image_bytes(load_source("digits")["train"].slice(0, 1).to_pylist()[0]["image"]))
    [answer] = Run(tmp_path / "run").predict([picture])
    learner, model = trained(tmp_path / "run")
    batch = learner.encoder.preprocess_and_collate([learner.task.parse_input(str(picture))])
    features = learner.encoder(batch).double().numpy()
    last = model["head.2.weight"].double().numpy(), model["head.2.bias"].double().numpy()
    outputs = by_hand(features, model) @ last[0].T + last[1]
    assert answer["label"] == learner.data_info["classes"][int(outputs.argmax())]


def test_later_rounds_train_both_layers(tmp_path: Path) -> None:
    result = run(job(federation={"clients": 6, "rounds": 2}), tmp_path / "run")
    learner, model = trained(tmp_path / "run")
    assert len({line["model_sha256"] for line in result.rounds}) == 2
    assert not torch.equal(model["head.0.weight"], learner.initial()["head.0.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_is_taken_out_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    setting = job(kind)
    setting = job(kind, tune=setting.tune.model_dump(exclude_unset=True) | {"keep_sums": True})
    run(setting, tmp_path / "run")
    forget(tmp_path / "run", "client-0002")
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    never = model_without(setting, tmp_path / "never", "client-0002")
    assert set(found) == {f"head.{at}.{part}" for at in "02" for part in ("weight", "bias")}
    assert all(torch.equal(found[name], tensor) for name, tensor in never.items())


# Under a promise


def promised(unit: str = "example", kind: str = "ridge", **privacy: Any) -> Job:
    tune = {"head_init": kind, "feature_norm": private.NORM, "hidden": UNITS}
    return private.job(unit, kind, tune=tune, privacy=privacy)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_moves_the_sums_of_random_features_by_the_sensitivity(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its features are: clipping comes after the map."""
    setting, model = promised(kind=kind), drawn(width=7)
    monkeypatch.setattr(private, "learner_of", lambda job: learner_of(job, model, "abc"))

    def sent(records: Sequence[private.Record]) -> private.Vector:
        return private.sent(setting, records)

    detectors.check_sensitivity(sent, private.people(), private.strange(), math.sqrt(2))
    huge = sent([("huge", torch.full((7,), 1e6), 1)]) - sent([])
    assert np.linalg.norm(huge) <= math.sqrt(2)


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_under_a_promise_noises_the_last_layers_sums_and_leaves_the_first(
    tmp_path: Path, unit: str
) -> None:
    setting = promised(unit, seeded_noise=True)
    results = [run(setting, tmp_path / str(n), **o) for n, o in enumerate(({}, {"engine": "loop"}))]
    assert len({r.model_sha256 for r in results}) == 1
    assert results[0].privacy["releases"] == 1
    assert results[0].privacy["sums_of_features"]["sensitivity"] == math.sqrt(2)
    learner, model = trained(tmp_path / "0")
    assert torch.equal(model["head.0.weight"], learner.initial()["head.0.weight"])
    small = promised(unit, seeded_noise=True, noise_multiplier=1e-4)
    assert run(small, tmp_path / "small").final["server"]["accuracy"] > 0.4  # of ten classes


def test_a_linear_heads_features_are_as_they_are() -> None:
    features = torch.randn(3, 4)
    assert random_features(features, {"head.weight": torch.ones(2, 4)}) is features
