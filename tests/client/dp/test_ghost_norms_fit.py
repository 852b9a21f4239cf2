"""When ghost norms count as wrong: norms and sums of gradients given as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from atoll.client.dp.ghost_norms_fit import NORM_TOLERANCE, TOLERANCE, _wrong_sum

Gradients = dict[str, list[list[float]]]
"""Two examples' gradients by parameter."""

PLAIN: Gradients = {"weight": [[3.0, 0.0], [0.0, 1.0]], "bias": [[4.0], [-1.0]]}
NORMS = [5.0, 2.0**0.5]


@dataclass
class Passed:
    """A pass of two examples: what is summed of each, and the norms that ghosts give."""

    gradients: Gradients = field(default_factory=lambda: PLAIN)
    norms: list[float] = field(default_factory=lambda: NORMS)

    @property
    def terms(self) -> Gradients:
        return self.gradients

    def squared_norms(self) -> torch.Tensor:
        return torch.tensor(self.norms, dtype=torch.float64).square()

    def sum_of(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted; an example of weight zero has no part, whatever its numbers."""
        return {name: self._sum(weights, rows) for name, rows in self.gradients.items()}

    @staticmethod
    def _sum(weights: torch.Tensor, rows: list[list[float]]) -> torch.Tensor:
        total = torch.zeros(len(rows[0]), dtype=torch.float64)
        for weight, row in zip(weights, rows, strict=True):
            if weight:
                total += weight * torch.tensor(row, dtype=torch.float64)
        return total


def wrong(passed: Passed, expected: dict[str, list[float]] | None = None) -> str | None:
    by_name = expected or {n: [sum(column) for column in zip(*r, strict=True)] for n, r in PLAIN.items()}
    whole: Any = {name: torch.tensor(value, dtype=torch.float64) for name, value in by_name.items()}
    return _wrong_sum(cast("Any", passed), whole, 2)


def times(by: float) -> tuple[Gradients, dict[str, list[float]]]:
    gradients = {name: [[by * v for v in row] for row in rows] for name, rows in PLAIN.items()}
    return gradients, {n: [sum(column) for column in zip(*r, strict=True)] for n, r in gradients.items()}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_right_sums_and_norms_pass_and_wrong_ones_do_not_however_small(scale: float) -> None:
    gradients, expected = times(scale)
    norms = [scale * norm for norm in NORMS]
    assert wrong(Passed(gradients, norms), expected) is None
    for name in PLAIN:
        for by, fault in ((0.1, None), (10.0, f"the gradients of {name} don't add up to the batch's")):
            other = {n: list(values) for n, values in expected.items()}
            other[name][0] += by * TOLERANCE * 5 * scale
            assert wrong(Passed(gradients, norms), other) == fault, (name, by)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_norm_may_be_off_by_its_tolerance_and_no_more(row: int, sign: int) -> None:
    for by, fault in ((0.5, None), (2.0, "a norm isn't that of what is summed")):
        norms = list(NORMS)
        norms[row] *= 1 + sign * by * NORM_TOLERANCE
        assert wrong(Passed(PLAIN, norms)) == fault, by


def test_examples_without_a_gradient_pass() -> None:
    nothing = {name: [[0.0] * len(row) for row in rows] for name, rows in PLAIN.items()}
    assert wrong(Passed(nothing, [0.0, 0.0]), {"weight": [0.0, 0.0], "bias": [0.0]}) is None


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_as_zero_and_is_no_fault(row: int, value: float) -> None:
    norms = list(NORMS)
    norms[row] = value
    assert wrong(Passed(PLAIN, norms)) is None
    gradients = {name: [list(r) for r in rows] for name, rows in PLAIN.items()}
    gradients["bias"][row] = [value]
    assert wrong(Passed(gradients, NORMS)) is None


def test_a_parameter_that_no_hook_sees_is_named() -> None:
    assert wrong(Passed({"weight": PLAIN["weight"]}, [3.0, 1.0])) == "bias is used where no hook sees it"


def test_a_gradient_far_smaller_than_the_examples_norms_is_not_held_to_its_own_length() -> None:
    """Of a bias before a softmax, say, where rounding is all that there is."""
    gradients = PLAIN | {"bias": [[1e-9], [-1e-9]]}
    off = TOLERANCE * TOLERANCE * 4.0
    for by, fault in ((0.5, None), (3.0, "the gradients of bias don't add up to the batch's")):
        assert wrong(Passed(gradients, [3.0, 1.0]), {"weight": [3.0, 1.0], "bias": [by * off]}) == fault
