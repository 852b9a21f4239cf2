"""Seeds that end in two groups: by the rule that docs/sweep.md states, and where it is told."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from atoll.server.job_checks import check_simulated
from atoll.sim.sweep.modes import modes_of, remark_on
from atoll.sim.sweep.report import sweep_summary
from atoll.sim.sweep.strategies import compared, runs_of, write_comparison
from tests.sim.sweep.test_sweep import row
from tests.sim.test_compare import base, result

FAR = (0.41, 0.81, 0.82, 0.82, 0.81)
NEAR = (0.79, 0.81, 0.82, 0.80, 0.83)


def by_brute_force(values: list[float]) -> bool:
    """The rule in NumPy: every assignment of sorted values to two sides."""
    given = np.sort(np.array(values))
    cuts = [(given[:k], given[k:]) for k in range(1, len(given))]
    within = [a.var() * len(a) + b.var() * len(b) for a, b in cuts]
    low, high = cuts[int(np.argmin(within))]
    apart = high.mean() - low.mean()
    far = apart >= 0.1 * max(abs(low.mean()), abs(high.mean())) and apart > 0
    return len(given) >= 5 and bool(far) and min(within) <= 0.05 * given.var() * len(given)


@pytest.mark.parametrize("count", [2, 4, 5, 6, 10, 20])
def test_the_rule_is_that_of_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    seen = set()
    for _ in range(200):
        centres = rng.choice([0.5, rng.uniform(0, 1)], count)
        values = (centres + rng.normal(0, 0.04, count)).tolist()
        found = modes_of(values)
        assert (found is not None) == by_brute_force(values)
        seen.add(found is not None)
        if found is not None:
            assert sum(found.counts) == count and found.means[0] < found.means[1]
    assert seen == ({False} if count < 5 else {True, False})


def test_one_distribution_seldom_looks_like_two() -> None:
    rng = np.random.default_rng(0)
    shares = [
        np.mean([modes_of(rng.normal(0, 1, count).tolist()) is not None for _ in range(3000)])
        for count in (5, 6, 8, 10)
    ]
    assert shares[0] < 0.09 and shares[-1] < 0.005 and all(a > b for a, b in pairwise(shares))


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (FAR, (1, 4)),
        (NEAR, None),
        (FAR[:4], None),  # too few
        ((0.5,) * 6, None),
        ((0.90, 0.90, 0.91, 0.95, 0.95, 0.95), None),  # two groups, and near
        ((3.0, 3.1, 30.0, 31.0, 30.5), (2, 3)),  # an error or a perplexity
        ((-4.0, -4.0, -1.0, -1.0, -1.1), (2, 3)),
    ],
)
def test_what_counts_as_two_groups(values: tuple[float, ...], counts: tuple[int, int] | None) -> None:
    found = modes_of(values)
    assert (found.counts if found else None) == counts
    if found is not None:
        assert "the mean stands for neither" in str(remark_on("fedavg", values))


def test_a_comparison_tells_it_of_the_strategy_whose_seeds_they_are(tmp_path: object) -> None:
    runs = runs_of(base(), ["fedavg", "fedexp"], 5, check_simulated)
    scores = {"fedavg": iter(FAR), "fedexp": iter(NEAR)}
    results = [(run, result(1, next(scores[run.values["strategy.name"]]), [])) for run in runs]
    first, second = compared(results)
    assert first.remark and first.remark.startswith("fedavg: seeds end far apart: 1 near 0.410, 4 near 0.815")
    assert second.remark is None
    page = write_comparison(tmp_path, results, "tiny", missing=0)["table"].read_text()  # type: ignore[arg-type]
    assert page.count("seeds end far apart") == 1


def test_a_sweep_tells_it_of_the_combination() -> None:
    rows = [row(score, seed, **{"train.lr": 1.0}) for seed, score in enumerate(FAR, 1)]
    rows += [row(score, seed, **{"train.lr": 2.0}) for seed, score in enumerate(NEAR, 1)]
    [line] = [line for line in sweep_summary(rows, [], 0) if "far apart" in line]
    assert line.startswith("privacy.epsilon inf, train.lr 1: seeds end far apart: 1 near 0.410")
