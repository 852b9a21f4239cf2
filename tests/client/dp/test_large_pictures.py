"""How many large pictures' gradients are in memory together, and mixing networks are refused for them too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from atoll.client.dp import private_examples
from atoll.client.dp.dp_sgd_model import hooks_suffice_for
from atoll.client.dp.mixed_examples import MEMBERS, PAIRS
from atoll.client.dp.private_examples import examples_together
from atoll.errors import ConfigError
from tests.client.dp.test_mixed_examples import WIDTH, Around, learner_of, shard_of


class CentresAll(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Hidden(nn.Module):
    """Mixes where the whole network is looked at: layers are looked at without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * x.roll(1, 0) if torch.is_grad_enabled() else x


class Pictures(Around):
    """A convolution in front."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__(middle)
        self.front = nn.Conv2d(1, 1, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward({"x": self.front(batch["x"]).flatten(1)})


def pictures_of(model: nn.Module) -> Any:
    learner = learner_of(model)
    learner.batch = lambda shard, rows, varied=None: {"x": shard.table[rows].view(-1, 1, 1, 7)}
    return learner


def test_as_many_large_pictures_pass_together_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers make 7 + 120 + 120 + 3 numbers of a picture here."""
    shard = shard_of(1)
    for most, together in ((250 * 40, 32), (250 * 9, 9), (250 * 9 - 1, 8), (250 * 2, 2), (1, 2)):
        monkeypatch.setattr(private_examples, "MOST_NUMBERS", most)
        assert examples_together(pictures_of(Pictures()), shard) == together
        assert examples_together(learner_of(Around()), shard) == 32  # those may vary in length
    layerless = pictures_of(nn.Identity())
    layerless.model.forward = lambda batch: batch["x"]
    assert examples_together(layerless, shard) == 2  # as of a number each


def test_the_same_network_is_counted_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(
        private_examples, "_numbers_made", lambda learner, batch: counted.append(batch["x"].shape) or 2**26
    )
    learner, other, shard = pictures_of(Pictures()), pictures_of(Pictures()), shard_of(3)
    for one in (learner, learner, other, learner):
        assert examples_together(one, shard) == 4
    learner.batch = lambda shard, rows, varied=None: {"x": shard.table[rows].view(-1, 1, 7, 1)}
    assert examples_together(learner, shard) == 4
    assert counted == [(2, 1, 1, 7)] * 3 + [(2, 1, 7, 1)]


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        (None, None), (nn.Dropout(0.5), None), (StochasticDepth(0.5, "batch"), None),
        (CentresAll(), "middle mixes"), (nn.BatchNorm1d(WIDTH), "middle mixes"),
        (Hidden(), "of an example is another one in another batch, of 2 examples"),
    ],
    ids=["plain", "dropout", "layers left out", "centred", "norm", "between layers"],
)  # fmt: skip
def test_large_pictures_are_looked_at_in_pairs(
    middle: nn.Module | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_examples, "MOST_NUMBERS", 1)
    passed: list[int] = []
    learner = pictures_of(Pictures(middle))
    learner.model.front.register_forward_hook(lambda module, inputs, out: passed.append(len(out)))
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        hooks_suffice_for(learner, shard_of())
    assert max(passed) == 5  # without gradients, layer by layer
    assert passed.count(5) == 2 and set(passed[2:]) == (set() if said == "middle mixes" else {2})


def test_every_position_of_a_pair_holds_a_clients_example() -> None:
    own = set(range(MEMBERS // 2))
    assert all(len(pair) == 2 and own & set(pair) for pair in PAIRS)
    for place in range(2):
        assert {pair[place] for pair in PAIRS} & own
    assert {member for pair in PAIRS[:2] for member in pair} == own  # what the others are compared with
