"""What one update of a head gives away: against autograd, closed forms and known figures."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from atoll.client.heads.feature_table import FeatureTable
from atoll.job.job import Job
from atoll.sim.audit.gradient_inversion import Probe, probed
from atoll.sim.population.population import Population
from tests.privacy.runs.test_private_runs import job

CLASSES, WIDTH = 10, 64
EXAMPLE = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 1.0, "clipping_norm": 1.0,
}  # fmt: skip
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "clipping_norm": 0.5}


def probe_of(privacy: dict[str, Any], count: int, *, shared: float = 0.0) -> Probe:
    """A head of zeros on examples of all classes in turn; two examples' cosine is `shared` on average."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn((count, WIDTH), generator=generator) / WIDTH**0.5
    same = torch.randn(WIDTH, generator=generator) / WIDTH**0.5
    features = (1 - shared) ** 0.5 * own + shared**0.5 * same
    targets = torch.arange(count) % CLASSES
    head = {"head.weight": torch.zeros(CLASSES, WIDTH), "head.bias": torch.zeros(CLASSES)}
    return Probe(job(privacy), head, FeatureTable.of(features, targets), features, targets)


def alone(count: int) -> list[np.ndarray]:
    return [np.array([row]) for row in range(count)]


def test_a_step_on_one_example_tells_its_label_and_its_features() -> None:
    assert probe_of({"unit": "none"}, 100).attack_result(alone(100), is_protected=False) == {
        "label": 1.0,
        "cosine": pytest.approx(1.0, abs=1e-6),
    }


def test_the_probe_takes_the_step_that_autograd_takes() -> None:
    probe = probe_of({"unit": "none"}, 8)
    model = nn.Linear(WIDTH, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    nn.functional.cross_entropy(model(probe.features), probe.targets).backward()
    [moved] = probe._moved([np.arange(8)], False)
    assert model.weight.grad is not None and model.bias.grad is not None
    lr = probe.job.train.lr
    torch.testing.assert_close(moved["head.weight"], -lr * model.weight.grad)
    torch.testing.assert_close(moved["head.bias"], -lr * model.bias.grad)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.62])
def test_eight_classes_tell_all_their_labels_and_mix_their_features(shared: float) -> None:
    """The label's row is .9 x - .1 (the other seven): with cosines c between any two examples, its cosine
    with x is (.9 - .7 c) / sqrt(.81 + .07 - 1.26 c + .42 c)."""
    probe = probe_of({"unit": "none"}, 800, shared=shared)
    batches = [np.arange(start, start + 8) for start in range(0, 800, 10)]
    found = probe.attack_result(batches, is_protected=False)
    assert found["label"] == 1.0
    assert found["cosine"] == pytest.approx((0.9 - 0.7 * shared) / (0.88 - 0.84 * shared) ** 0.5, abs=0.02)


def test_noise_on_single_examples_leaves_little_more_than_chance() -> None:
    """At a noise multiplier of 1 the label's bias stands out from the others' by .75 deviations."""
    probe = probe_of(EXAMPLE, 1000)
    found = probe.attack_result(alone(1000), is_protected=True)
    # p - y is -.9 at the label and .1 elsewhere, of norm .95; features of length 1 stand beside the bias's
    # one, so that the gradient is longer than the clipping norm of 1, and clipped.
    generator = np.random.default_rng(1)
    gap = (0.9 + 0.1) / ((0.9**2 + 9 * 0.1**2) ** 0.5 * 2**0.5)
    noise = generator.standard_normal((100_000, CLASSES))
    noise[:, 0] += gap
    expected = float((noise.argmax(axis=1) == 0).mean())
    assert found["label"] == pytest.approx(expected, abs=5 * (expected / 1000) ** 0.5)
    assert abs(found["cosine"]) < 0.1


@pytest.mark.parametrize("privacy", [EXAMPLE, EXAMPLE | {"where": "distributed"}, CLIENT])
def test_on_real_features_the_figures_are_the_known_ones(privacy: dict[str, Any]) -> None:
    """Elsewhere 100 % and 1.00 were seen without protection, 18 % and .01 with it, of ten classes; of
    eight classes together 100 % and .77, where that last cosine depends on how alike the features are."""
    setting = job(privacy)
    found = probed(setting, Population.of(setting))
    assert found is not None
    assert found["batch_size"] == 8 and found["chance"] == {"one": 0.1, "batch": 0.8}
    plain, kept = found["unprotected"], found["protected"]
    assert plain["one"] == {"label": 1.0, "cosine": pytest.approx(1.0, abs=1e-6)}
    assert plain["batch"]["label"] == 1.0 and 0.6 < plain["batch"]["cosine"] < 0.9
    assert kept["one"]["label"] < 0.3 and abs(kept["one"]["cosine"]) < 0.05
    assert abs(kept["batch"]["cosine"]) < 0.05


def test_without_a_promise_nothing_is_kept_and_hidden_layers_are_not_probed() -> None:
    def probe(**tables: Any) -> dict[str, Any] | None:
        setting: Job = job({"unit": "none"}, **tables)
        return probed(setting, Population.of(setting))

    plain = probe()
    assert plain is not None and plain["protected"] is None
    assert probe(tune={"method": "head", "hidden": 8}) is None
    assert probe(tune={"method": "last-k", "layers": 1}) is None
