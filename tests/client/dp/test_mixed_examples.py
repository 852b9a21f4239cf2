"""Networks in which examples see each other are refused, and those that only look like it aren't."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from atoll.client.dp import dp_sgd_model, mixed_examples
from atoll.client.dp.dp_sgd_model import hooks_suffice_for
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.mixed_examples import (
    BATCHES,
    MEMBERS,
    MOST_KEPT,
    TOLERANCE,
    _compare,
    _difference,
    _equal,
    _Probe,
    _Row,
    changed,
    mixing_layers,
    refuse_mixed_examples,
    refuse_mixing_layers,
)
from atoll.client.dp.per_example_gradients import per_example_gradients
from atoll.client.dp.private_examples import PrivateExamples
from atoll.errors import ConfigError
from tests.privacy.watchdogs import Record, Records, a_model

WIDTH = 120


class Around(nn.Module):
    """Two linear layers and what is between them."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.last = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        self.middle = middle or nn.Identity()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.last(self.between(self.middle(torch.tanh(self.first(batch["x"])))))
        return out

    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states


class CentresLargeBatches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if len(x) > 2 else x


class MixesInItsParent(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states + 0.01 * states.roll(1, 0)


class NormsByFunction(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(states, None, None, training=True)


class MasksByNumpy(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states * torch.from_numpy(np.random.rand(*states.shape) < 0.9)


class MasksByPython(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states * (0.5 if random.random() < 0.5 else 1.0)


class DropsAcross(Around):
    """Dropout where the examples are on the second axis."""

    def between(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(states.T, 0.5).T


class DropsAcrossAFew(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        few = nn.functional.dropout(states[:, :7].T, 0.5).T
        return torch.cat([few, states[:, 7:]], dim=1)


class Shuffles(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, torch.randperm(WIDTH)]


class BehindAZero(Around):
    """A branch that mixes, whose gate is still closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.branch = nn.Parameter(torch.zeros(())), CentresLargeBatches()

    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.gate.detach() * self.branch(states)


class DropsItself(Around):
    def between(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(states, 0.5) + 0.1 * torch.randn_like(states)


class LeavesOut(Around):
    """A layer that is left out for all alike, as wav2vec 2.0 does it."""

    def between(self, states: torch.Tensor) -> torch.Tensor:
        return states if bool(torch.rand([]) < 0.5) else 2 * states


def shard_of(count: int = 9) -> Any:
    draw = torch.Generator().manual_seed(4)
    return Records([Record(f"e{i}", torch.randn(7, generator=draw), i % 3) for i in range(count)])


def learner_of(model: nn.Module, loss: Any = nn.functional.cross_entropy) -> Any:
    learner = a_model(model)
    learner.objective.loss = lambda shard: loss
    return learner


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Around(CentresLargeBatches()), r"backbone small: layer middle mixes the examples of a batch"),
        (Around(nn.BatchNorm1d(WIDTH)), r"layer middle mixes"),
        (BehindAZero(), r"layer branch mixes"),
        (
            MixesInItsParent(),
            r"of an example is another one in another batch, of 8 examples",
        ),  # loss or gradient
        (
            NormsByFunction(),
            r"of an example is another one in another batch|can't be taken example by example",
        ),
        (MasksByNumpy(), r"of an example is another one drawn again from the same seeds"),
        (DropsAcross(), r"of an example is another one in another batch|draws \[120, \d\] numbers"),
        (DropsAcrossAFew(), r"draws \[7, 8\] numbers by bernoulli_ for a batch of 8"),
        (Shuffles(), r"draws by aten\.randperm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_network_that_mixes_examples_is_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hooks_suffice_for(learner_of(model), shard_of())


def test_draws_that_torch_does_not_make_are_found_in_the_end() -> None:
    """One number of Python's may come twice: of 20 looks one at least sees it."""
    with pytest.raises(ConfigError, match="is another one"):
        for _ in range(20):
            hooks_suffice_for(learner_of(MasksByPython()), shard_of())


def by_the_batch(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A mean over what is left of the batch once one class is ignored."""
    return nn.functional.cross_entropy(outputs, targets, ignore_index=0)


def test_a_loss_whose_divisor_is_the_batchs_is_refused() -> None:
    with pytest.raises(ConfigError, match="the gradient of an example is another one"):
        hooks_suffice_for(learner_of(Around(), by_the_batch), shard_of())


@pytest.mark.parametrize(
    "model",
    [
        Around(), Around(nn.Dropout(0.5)), Around(nn.LayerNorm(WIDTH)), Around(nn.BatchNorm1d(WIDTH).eval()),
        Around(StochasticDepth(0.5, "row")), Around(StochasticDepth(0.5, "batch")),
        DropsItself(), LeavesOut(),
    ],
    ids=["plain", "dropout", "norm", "still", "rows left out", "layers left out", "functions", "by a scalar"],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_network_whose_examples_are_apart_is_taken(model: nn.Module, count: int) -> None:
    hooks = hooks_suffice_for(learner_of(model), shard_of(count))
    assert hooks == all(module.training for module in model.modules())


def test_it_is_looked_at_once_a_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(dp_sgd_model, "refuse_mixed_examples", lambda *given, **more: seen.append(given))
    learner = learner_of(Around())
    assert not hooks_suffice_for(learner, cast(Any, [])) and not seen  # nothing to look at
    for _ in range(3):
        hooks_suffice_for(learner, shard_of())
    assert len(seen) == 1


@pytest.mark.parametrize("model", [Around(StochasticDepth(0.5, "batch")), LeavesOut(), DropsItself()])
def test_an_example_that_passes_alone_has_the_gradient_it_has_among_others(model: nn.Module) -> None:
    learner, shard = learner_of(model), shard_of(40)
    numbers = example_numbers(shard.keys)
    for number in range(4):
        examples = PrivateExamples(learner, cast(Any, shard), numbers, (1, "c", number))
        with per_example_gradients(learner.model, nn.functional.cross_entropy, hooks=True) as gradients:
            alone, among = (examples.gradients_of(gradients, rows) for rows in ([3], [0, 3, 7]))
        for name in alone:
            torch.testing.assert_close(alone[name][0], among[name][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "passing"), [([3], [3, 3]), ([3, 5], [3, 5]), ([0, 3, 7], [0, 3, 7])])
def test_a_draw_that_all_share_is_refused_for_a_single_example_too(
    rows: list[int], passing: list[int]
) -> None:
    """For a batch of one it would have the shape of a draw of each example's own."""
    learner, shard = learner_of(Around()), shard_of(40)
    examples = PrivateExamples(learner, cast(Any, shard), example_numbers(shard.keys), (1, "c", 0))
    found = examples.passed(lambda batch, targets: (targets, torch.rand(len(passing), 3)), rows)
    assert torch.equal(found[0], shard.targets_of(passing)) and found[1].shape == (len(passing), 3)
    with pytest.raises(ConfigError, match=r"draws \[1, 3\] numbers"):
        examples.passed(lambda batch, targets: torch.rand(1, 3), rows)


def test_every_position_of_a_batch_holds_a_clients_example_and_batches_differ_in_size() -> None:
    own = set(range(MEMBERS // 2))
    for place in range(MEMBERS):
        assert any(len(batch) > place and batch[place] in own for batch in BATCHES), place
    assert {len(batch) for batch in BATCHES} == {2, 3, 5, 8}
    assert all(own & set(batch) and set(batch) <= set(range(MEMBERS)) for batch in BATCHES)
    assert sorted(BATCHES[0]) == list(range(MEMBERS))


def test_other_inputs_are_other_and_only_where_they_are_to_be() -> None:
    batch = {
        "x": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    other = changed(batch, [1])
    assert other["x"].tolist() == [[1, 2, 3], [7, 6, 5]]
    assert other["input_ids"].tolist() == [[1, 2, 3], [6, 5, 4]]
    assert other["attention_mask"].tolist() == batch["attention_mask"].tolist()
    assert batch["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert changed(batch, [])["x"].tolist() == batch["x"].tolist()


ONE = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0]), "loss": torch.tensor(1.0)}


def test_a_difference_is_relative_to_the_length_of_all_tensors_together() -> None:
    """3, 4 and 12 are 13 long."""
    moved = ONE | {"b": torch.tensor([12.0 + 0.026])}
    assert _difference(ONE, ONE, {"a", "b"}) == 0.0
    assert _difference(ONE, moved, {"a", "b"}) == pytest.approx(0.002, rel=1e-4)
    assert _difference(ONE, moved, {"a"}) == 0.0
    both = {"a": torch.tensor([3.03, 4.04]), "b": torch.tensor([12.0])}
    assert _difference(ONE, both, {"a", "b"}) == pytest.approx(0.05 / 13, rel=1e-4)
    nothing = {name: torch.zeros_like(t) for name, t in ONE.items()}
    tiny = nothing | {"b": torch.tensor([1e-9])}
    assert _difference(nothing, tiny, {"a", "b"}) == pytest.approx(1e-3, rel=1e-4)
    for odd in (float("nan"), float("inf")):
        unsound = ONE | {"a": torch.tensor([odd, 4.0])}
        assert _difference(ONE, unsound, {"a", "b"}) == _difference(unsound, ONE, {"a", "b"}) == 0.0
        assert _difference(ONE, unsound, {"b"}) == 0.0


@pytest.mark.parametrize("name", ["loss", "b"])
def test_what_moves_by_more_than_rounding_is_refused_by_what_it_is(name: str) -> None:
    learner = learner_of(Around())
    size = {"loss": 1.0, "b": 13.0}[name]
    for by, refused in ((0.5, False), (1.5, True)):
        moved = ONE | {name: ONE[name] + by * TOLERANCE * size}
        if not refused:
            _compare(learner, {0: ONE, 1: ONE}, {0: ONE, 1: moved}, "in another batch, of 3 examples")
            continue
        what = "loss" if name == "loss" else "gradient"
        told = f"the {what} of an example is another one in another batch, of 3 examples"
        with pytest.raises(ConfigError, match=told):
            _compare(learner, {0: ONE, 1: ONE}, {0: ONE, 1: moved}, "in another batch, of 3 examples")


def test_a_probe_has_examples_of_the_whole_shard_and_as_many_changed_ones() -> None:
    probe = _Probe.of(learner_of(Around()), shard_of(9))
    assert probe.rows == [0, 3, 5, 8, 0, 3, 5, 8]
    assert _Probe.of(learner_of(Around()), shard_of(1)).rows == [0] * 8


def test_a_probe_tells_of_the_clients_own_examples_alone() -> None:
    learner, shard = learner_of(Around()), shard_of(9)
    probe = _Probe.of(learner, shard)
    asked: list[Any] = []

    def gradients(batch: Any, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.append((batch["x"].clone(), targets.clone()))
        return {"w": batch["x"].sum(1)}

    seen = probe.seen(gradients, (4, 0, 3, 7))
    assert sorted(seen) == [0, 3]
    x, targets = asked[0]
    plain = learner.batch(shard, [0, 0, 8, 8])["x"]
    assert torch.equal(x[1:3], plain[1:3]) and torch.equal(x[0], plain[0].flip(-1) + 1)
    assert torch.equal(x[3], plain[3].flip(-1) + 1)
    assert torch.equal(targets, shard.targets_of([0, 0, 8, 8]))
    with torch.no_grad():
        outputs = learner.model({"x": plain})
    for member, place in ((0, 1), (3, 2)):
        assert float(seen[member]["w"]) == pytest.approx(float(plain[place].sum()))
        loss = nn.functional.cross_entropy(outputs[place : place + 1], targets[place : place + 1])
        assert float(seen[member]["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_memory_that_is_short_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, shard = learner_of(Around()), shard_of(9)

    def fail(error: Exception) -> Any:
        def look(*given: Any, **named: Any) -> None:
            raise error

        return look

    monkeypatch.setattr(mixed_examples, "_look", fail(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        refuse_mixed_examples(learner, shard, hooks=False)
    monkeypatch.setattr(mixed_examples, "_look", fail(RuntimeError("vmap: no rule\nfor this")))
    with pytest.raises(ConfigError, match=r"example by example \(vmap: no rule\), so that"):
        refuse_mixed_examples(learner, shard, hooks=False)


class ByHalves(nn.Module):
    """Gives its first output rows as they are, and others that depend on the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[1:] - x.mean()])


def test_layers_are_compared_by_their_first_row_and_named_innermost_first() -> None:
    batch = {"x": torch.arange(35.0).view(5, 7) / 10}
    assert mixing_layers(Around(nn.Identity()), batch) == []
    assert mixing_layers(Around(ByHalves()), batch) == []
    nested = Around(nn.Sequential(nn.Identity(), CentresLargeBatches()))
    assert mixing_layers(nested, batch) == ["middle.1"]
    assert not [m for m in nested.modules() if m._forward_hooks]
    learner = learner_of(nested)
    with pytest.raises(ConfigError, match=r"layer middle\.1 mixes the examples of a batch"):
        refuse_mixing_layers(learner, {"x": batch["x"][:2]})
    refuse_mixing_layers(learner_of(Around()), {"x": batch["x"][:2]})


class Sums(nn.Module):
    """Adds two tensors, or the tensors of a table."""

    def forward(self, *given: Any) -> torch.Tensor:
        return sum(torch.as_tensor(t) for t in (given[0].values() if isinstance(given[0], dict) else given))


class AddsWhatIsMixed(Around):
    """A layer that mixes, and one after it that adds to its outputs what wasn't mixed."""

    def __init__(self, *, as_table: bool) -> None:
        super().__init__(CentresLargeBatches())
        self.sums, self.as_table = Sums(), as_table

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states = torch.tanh(self.first(batch["x"]))
        mixed = self.middle(states)
        found = self.sums({"a": states, "b": mixed}) if self.as_table else self.sums(states, mixed)
        out: torch.Tensor = self.last(found)
        return out


@pytest.mark.parametrize("as_table", [False, True])
def test_a_layer_after_one_that_mixes_is_not_named(as_table: bool) -> None:
    """Not where but one of its inputs is another one, and not where its inputs aren't seen."""
    batch = {"x": torch.arange(35.0).view(5, 7) / 10}
    assert mixing_layers(AddsWhatIsMixed(as_table=as_table), batch)[0] == "middle"
    assert "sums" not in mixing_layers(AddsWhatIsMixed(as_table=as_table), batch)


class CalledByWhatIsThere(Around):
    """Calls a layer once for each row that is unlike the one before."""

    def between(self, states: torch.Tensor) -> torch.Tensor:
        for _ in range(int((states[1:] != states[:-1]).any(1).sum())):
            states = self.middle(states)
        return states


def test_layers_may_be_called_more_often_for_one_batch_than_for_another() -> None:
    batch = {"x": torch.arange(35.0).view(5, 7) / 10}
    assert mixing_layers(CalledByWhatIsThere(), batch) == []


def rows(*tensors: torch.Tensor) -> list[_Row]:
    return [_Row.of(t) for t in tensors]


def test_rows_are_equal_up_to_rounding_alone() -> None:
    one = torch.tensor([1.0, 2.0])
    for other, same in ((one * (1 + 5e-5), True), (one * 1.01, False), (one[:1], False)):
        assert _equal(rows(one), rows(other)) == same
    for odd in (float("nan"), float("inf")):
        unsound = torch.tensor([1.0, odd])
        assert _equal(rows(unsound), rows(unsound.clone()))
        assert not _equal(rows(unsound), rows(one)) and not _equal(rows(one), rows(unsound))
    assert _equal([], []) and not _equal(rows(one), rows(one, one))
    assert not _equal(rows(one, one), rows(one, one + 1))
    there = torch.tensor([True, False])
    assert _equal(rows(there), rows(there.clone())) and not _equal(rows(there), rows(~there))


def test_large_rows_are_equal_by_sums_up_to_rounding_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    one = torch.randn(3, 20_000, 2, generator=draw)
    (kept,) = rows(one)
    assert one.numel() > MOST_KEPT == kept.values.numel() == kept.sizes.numel()
    flat = nn.functional.pad(one.double().flatten(), (0, 2 * MOST_KEPT - one.numel())).view(2, MOST_KEPT)
    torch.testing.assert_close(kept.values, flat[0] + flat[1])
    torch.testing.assert_close(kept.sizes, (flat[0].square() + flat[1].square()).sqrt())
    assert _equal(rows(one), rows(one * (1 + 2e-5)))
    for place in ((0, 0, 0), (2, 19_999, 1), (1, 777, 0)):  # a single number that is another one is seen
        other = one.clone()
        other[place] += 0.01
        assert not _equal(rows(one), rows(other)) and not _equal(rows(other), rows(one))
    assert not _equal(rows(one), rows(one.flip(1))) and not _equal(rows(one), rows(-one))
