"""Opacus' own engine beside ours: equal where it is right, and a test for each reason to do otherwise."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import GaussianAccountant
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from atoll.backbones.encoder import Model
from atoll.client.dp.dp_sgd import CLIP_ROUNDING_MARGIN
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.dp.mixed_examples import refuse_mixed_examples, refuse_mixing_layers
from atoll.client.dp.private_examples import on_device
from atoll.errors import ConfigError
from atoll.learning import trainable
from atoll.learning.objective.local_objective import LocalObjective
from atoll.privacy.noise import entropy, lattice_for
from tests.privacy.runs.neighbours import C, learner_start, pictures, quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

STEP: dict[str, Any] = {"tune": {"method": "full"}, "train": {"lr": 1.0, "batch_size": 1, "dropout": 0.0}}


class ByRow(nn.Module):
    """A learner's model whose input is which rows of the shard: Opacus takes tensors."""

    def __init__(self, model: Model, batch: Any) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model({name: t[rows] for name, t in self.batch.items()})
        return found


def engine_of(module: nn.Module, rows: int, *, norm: float, noise: float = 0.0, lr: float = 1.0) -> Any:
    """(module, optimizer, loader) as Opacus' engine makes them, for one batch of all rows."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return PrivacyEngine().make_private(
        module=module, optimizer=torch.optim.SGD(parameters, lr=lr),
        data_loader=DataLoader(TensorDataset(torch.arange(rows)), batch_size=rows),
        noise_multiplier=noise, max_grad_norm=norm, poisson_sampling=False,
    )  # fmt: skip


def test_one_round_of_one_client_is_what_opacus_engine_does() -> None:
    """SqueezeNet in full, 24 pictures, one step, no noise: the clipped sums are equal."""
    learner, shard = pictures(**STEP)
    start = learner_start(learner)
    update = train_privately(learner, start, shard, quiet(learner.job), client="c", round=1, plan={})
    ours = {name: -delta.double() for name, delta in update.delta.items()}

    trainable.load_values(learner.model, start)
    trainable.training_mode(learner.model)
    for layer in learner.model.modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
    rows = list(range(len(shard)))
    batch, targets = on_device(learner, learner.collate(shard, rows), shard.targets_of(rows))
    module, optimizer, loader = engine_of(
        ByRow(learner.model, batch), len(shard), norm=C * CLIP_ROUNDING_MARGIN
    )
    for (drawn,) in loader:
        optimizer.zero_grad()
        learner.objective.loss(shard)(module(drawn), targets[drawn]).backward()
        optimizer.pre_step()
    theirs = {
        name: p.summed_grad.double()
        for name, p in module._module.model.named_parameters()
        if p.requires_grad and getattr(p, "summed_grad", None) is not None
    }
    assert theirs.keys() == ours.keys()
    length = math.sqrt(sum(float(t.square().sum()) for t in theirs.values()))
    apart = math.sqrt(sum(float((theirs[name] - ours[name]).square().sum()) for name in ours))
    assert length > 0.5 and apart < 1e-6 * length


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_one_example_without_a_number_ruins_opacus_model_and_counts_as_zero_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    features[3, 1] = math.nan
    module, optimizer, _ = engine_of(linear(), 8, norm=1.0)
    nn.functional.cross_entropy(module(features), torch.zeros(8, dtype=torch.long)).backward()
    optimizer.step()
    assert not all(bool(torch.isfinite(p).all()) for p in module.parameters())

    learner, shard = pictures(**STEP)
    broken = trainable.to_parameters(
        trainable.trainable(learner.model), {n: t.clone() for n, t in learner_start(learner).items()}
    )
    real = LocalObjective.loss

    def loss(objective: LocalObjective, rows: Any) -> Any:
        value = real(objective, rows)
        return lambda outputs, targets: (
            value(outputs, targets) + torch.where(targets == 0, math.nan, 0.0).mean()
        )

    monkeypatch.setattr(LocalObjective, "loss", loss)
    update = train_privately(learner, broken, shard, quiet(learner.job), client="c", round=1, plan={})
    assert all(bool(torch.isfinite(delta).all()) for delta in update.delta.values())
    assert any(bool(delta.any()) for delta in update.delta.values())


def test_opacus_takes_the_rate_and_the_divisor_from_how_many_examples_a_client_has() -> None:
    """A number that is private here: both are the job's own."""
    rates, divisors = [], []
    for rows in (20, 21):
        data = TensorDataset(torch.zeros(rows, 3))
        model = linear()
        _, optimizer, loader = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        rates.append(loader.sample_rate)
        divisors.append(optimizer.expected_batch_size)
    assert len(set(rates)) == 2 and len(set(divisors)) == 2
    learner, _ = pictures(**STEP)
    assert learner.job.privacy.sampling_rate == 1.0  # with any number of rows


def test_opacus_secure_noise_cannot_be_had() -> None:
    with pytest.raises(ImportError, match="torchcsprng"):
        PrivacyEngine(secure_mode=True)


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")
def test_opacus_gaussian_accountant_forgets_what_was_spent_when_the_rate_changes() -> None:
    accountant = GaussianAccountant()
    for _ in range(1000):
        accountant.step(noise_multiplier=1.0, sample_rate=0.5)
    with pytest.raises(ValueError, match="have to stay constant"):
        accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.history == []


class Centred(nn.Module):
    """Takes the batch's mean off, in a layer whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y - y.mean(0, keepdim=True)


def test_opacus_validator_lets_layers_pass_that_mix_a_batch() -> None:
    assert ModuleValidator.validate(Centred()) == []
    learner, shard = pictures(**STEP)
    plain = learner.model.forward

    def centred(batch: Any) -> torch.Tensor:
        found: torch.Tensor = plain(batch)
        return found - found.mean(0, keepdim=True)

    learner.model.forward = centred  # type: ignore[method-assign]
    batch, _ = on_device(learner, learner.collate(shard, [0, 1]), shard.targets_of([0, 1]))
    with pytest.raises(ConfigError, match="the loss of an example is another one in another batch"):
        refuse_mixing_layers(learner, batch)
        refuse_mixed_examples(learner, shard, hooks=False)


class Call:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def test_opacus_checkpoints_run_what_is_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Call()))
    with pytest.raises(RuntimeError, match="Invalid magic number"):
        PrivacyEngine().load_checkpoint(path=path, module=linear())
    assert "it ran" in capsys.readouterr().out


def test_opacus_noise_is_a_float_at_any_distance() -> None:
    """Its noise has no grid, so that its last bits tell of what is beneath; ours is a multiple of one."""
    model = nn.Linear(100, 100)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=1,
    )  # fmt: skip
    for p in model.parameters():
        p.summed_grad = torch.zeros_like(p)  # type: ignore[attr-defined]
    optimizer.add_noise()
    noise = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    grid = lattice_for(1.0, 1.0, len(noise), entropy).granularity
    assert bool(noise.any())
    assert not bool((torch.round(noise / grid) * grid == noise).all())
