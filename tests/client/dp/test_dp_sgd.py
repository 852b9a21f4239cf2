"""How heads are trained privately, and what is told of a client: by hand, number by number."""

import pytest
import torch

from atoll.client.dp.adaptive_norms import AdaptiveNorm, ClippingScales
from atoll.client.dp.dp_sgd import CLIP_ROUNDING_MARGIN, DpSgd, StackedNoise, clip_factors, stacked_noise
from atoll.client.heads.layers import Layers
from atoll.privacy.noise import lattice_for, seeded
from atoll.protocol.messages import CHARGED_ROUNDS

EVERY = torch.ones(1, 4)


def private(clipping_norm: float, divisor: float = 1.0, **more: int) -> DpSgd:
    return DpSgd(clipping_norm, 1.0, divisor, lambda client: seeded(1), charged=more)


def gradients_of(norms: list[float]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One client's examples: an input of one 1, and an error as long as the gradient is to be."""
    inputs, error = torch.ones(1, len(norms), 1), torch.tensor(norms).view(1, -1, 1)
    return [inputs, torch.zeros(1, len(norms), 1)], [error]


def test_clipped_gradients_stay_under_the_norm_in_single_precision_too() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(3, 50, 7, generator=generator), torch.zeros(3, 50, 5)]
    each = [torch.randn(3, 50, 5, generator=generator) * 10]
    factors = clip_factors(values, each, torch.ones(3, 50), private(0.3))
    clipped = (each[0] * factors[..., None]).double().norm(dim=2) * values[0].double().norm(dim=2)
    assert float(clipped.max()) <= 0.3
    assert float(clipped.min()) == pytest.approx(0.3 * CLIP_ROUNDING_MARGIN, rel=1e-6)
    assert 1 - 2e-5 < CLIP_ROUNDING_MARGIN < 1


def test_factors_clip_divide_and_leave_out_whoever_has_no_share() -> None:
    values, each = gradients_of([0.1, 0.5, 2.0, 8.0])
    factors = clip_factors(values, each, torch.tensor([[1.0, 2.0, 1.0, 0.0]]), private(1.0, 4.0))
    assert factors.tolist() == [pytest.approx([0.25, 0.25, 0.125 * CLIP_ROUNDING_MARGIN, 0.0], rel=1e-6)]


def test_an_example_that_is_not_finite_counts_as_zero_and_so_within_the_norm() -> None:
    values, each = gradients_of([0.25, 2.0, float("nan"), float("inf")])
    adaptive = AdaptiveNorm(0.5, 0.2, 1e-9, 4.0, lambda client: seeded(1))
    scales = ClippingScales(adaptive, ["a"], 1)
    factors = clip_factors(values, each, EVERY.clone(), private(0.5), scales)
    assert factors[0, :2].tolist() == pytest.approx([1.0, 0.25 * CLIP_ROUNDING_MARGIN], rel=1e-6)
    assert each[0][0, 2:].tolist() == [[0.0], [0.0]] and values[0][0, 2:].tolist() == [[0.0], [0.0]]
    assert scales._counts == [(3, 4)]


def test_a_scale_clips_at_so_many_times_the_norm_and_divides_by_it() -> None:
    """At a scale of 4, gradients longer than 2 are clipped; what is sent is in units of the scale."""
    values, each = gradients_of([1.0, 1.9, 2.1, 16.0])
    adaptive = AdaptiveNorm(0.5, 0.2, 1e-9, 4.0, lambda client: seeded(1), begin={"a": 4.0})
    scales = ClippingScales(adaptive, ["a"], 1)
    factors = clip_factors(values, each, EVERY.clone(), private(0.5), scales)
    margin = CLIP_ROUNDING_MARGIN
    assert factors.tolist() == [pytest.approx([0.25, 0.25, 0.5 * margin / 2.1, 0.5 * margin / 16], rel=1e-6)]
    assert scales._counts == [(2, 4)]


def test_a_client_is_told_apart_by_its_charged_rounds_alone() -> None:
    weights, states = private(1.0, a=3).public_fields(["a", "b"])
    assert weights == (1, 1)
    assert {name: state.tolist() for name, state in states.items()} == {
        "train_loss.sum": [0.0, 0.0],
        "train_loss.count": [0.0, 0.0],
        CHARGED_ROUNDS: [3.0, 0.0],
    }


HEAD = {
    "head.0.weight": torch.zeros(2, 3), "head.0.bias": torch.zeros(2),
    "head.2.weight": torch.zeros(4, 2), "head.2.bias": torch.zeros(4),
}  # fmt: skip
SIZES = (("head.0.weight", (2, 3)), ("head.2.weight", (4, 2)), ("head.0.bias", (2,)), ("head.2.bias", (4,)))


def test_each_step_and_client_has_noise_of_its_own_source_and_none_is_used_twice() -> None:
    """Clients of unequal steps: who trains on after the others has noise in its last steps too."""
    private = DpSgd(0.5, 2.0, 4.0, lambda client: seeded({"a": 1, "b": 2, "c": 3}[client]))
    layers = Layers.of(HEAD)
    steps = [("a", 3), ("b", 3), ("c", 1)]
    noise = stacked_noise(layers, steps, private, "cpu")
    assert [len(step) for step in noise] == [2, 2, 2]
    assert [len(step[0].numbers) for step in noise] == [3, 2, 2]
    for place, (client, count) in enumerate(steps):
        lattice = lattice_for(2.0, 0.125, 20, seeded(place + 1))
        drawn = torch.from_numpy(lattice.noise(20 * count)).view(count, 20)
        for step in range(count):
            assert {layer.granularity for layer in noise[step]} == {lattice.granularity}
            found = layers.unstack([layer.numbers[place : place + 1] for layer in noise[step]])
            laid_out = torch.cat([found[name].reshape(-1) for name, _ in SIZES])
            assert torch.equal(laid_out, drawn[step]), (client, step)


def test_one_source_for_all_gives_each_client_and_step_the_next_numbers() -> None:
    """As the system's entropy is one: clients are drawn for in one go."""
    source = seeded(4)
    private = DpSgd(0.5, 2.0, 4.0, lambda client: source)
    noise = stacked_noise(Layers.of(HEAD), [("a", 2), ("b", 1)], private, "cpu")
    drawn = torch.from_numpy(lattice_for(2.0, 0.125, 20, seeded(4)).noise(60)).view(3, 20)
    seen = [(0, 0), (1, 0), (0, 1)]  # (step, client) in the order of the draws
    for (step, place), numbers in zip(seen, drawn, strict=True):
        found = Layers.of(HEAD).unstack([layer.numbers[place : place + 1] for layer in noise[step]])
        assert torch.equal(torch.cat([found[name].reshape(-1) for name, _ in SIZES]), numbers)
    assert (
        stacked_noise(Layers.of(HEAD), [("a", 2)], DpSgd(0.5, 0.0, 4.0, lambda client: source), "cpu") == []
    )


def test_a_gradient_is_rounded_to_the_grid_before_its_noise_is_added() -> None:
    noise = StackedNoise(0.25, torch.tensor([[[1.0, -2.0]], [[8.0, 8.0]]], dtype=torch.float64))
    added = noise.added(torch.tensor([[[0.3, 0.4]]]))
    assert added.tolist() == [[[1.25, -1.5]]]
