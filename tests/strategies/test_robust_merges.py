"""Merges against hostile clients: byzfl's figures, SciPy, Flower and the definitions as oracles."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InconsistentUpdates
from atoll.job.job import StrategySection
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import stacked
from atoll.strategies import build_strategy
from atoll.strategies.options import HOSTILE_OPTIONS
from atoll.strategies.robust.bulyan import bulyan, krum_choice
from atoll.strategies.robust.centered_clipping import centered_clipping
from atoll.strategies.robust.coordinate_median import coordinate_median
from atoll.strategies.robust.geometric_median import geometric_median
from atoll.strategies.robust.krum import krum, multi_krum
from atoll.strategies.robust.nearest_neighbour_mixing import mixed
from atoll.strategies.robust.norm_bound import norm_bound
from atoll.strategies.robust.trimmed_mean import trimmed_mean

ROWS = np.array(
    [
        [-4, 1, 5, -3], [-1, 0, 0, -1], [37, 45, 41, 36], [1, 5, -3, -1],
        [0, 0, -1, -3], [5, 1, -4, 1], [5, -3, -1, 0], [0, -1, -3, 5],
    ],
    dtype=np.float64,
)  # fmt: skip
"""The third client is far out."""
HOSTILE = 2


def drawn(clients: int, numbers: int = 40) -> np.ndarray:
    rows = np.random.default_rng(clients).normal(size=(clients, numbers))
    rows[: clients // 5] = rows[: clients // 5] * 3 + 8
    return rows


def krum_of_byzfl(name: str) -> Callable[[Any, int], Callable[..., Any]]:
    """byzfl's score counts the n - f - 1 nearest, one more than the paper's: its f is one larger."""
    return lambda byzfl, f: getattr(byzfl, name)(f + 1)


PAIRS: dict[str, tuple[Callable[[torch.Tensor, int], torch.Tensor], Callable[[Any, int], Any]]] = {
    "coordinate-median": (lambda rows, f: coordinate_median(rows), lambda byzfl, f: byzfl.Median()),
    "trimmed-mean": (trimmed_mean, lambda byzfl, f: byzfl.TrMean(f)),
    "geometric-median": (
        lambda rows, f: geometric_median(rows, 1e-6, 200),  # which begin elsewhere and meet
        lambda byzfl, f: byzfl.GeometricMedian(nu=1e-6, T=200),
    ),
    "krum": (krum, krum_of_byzfl("Krum")),
    "multi-krum": (lambda rows, f: multi_krum(rows, f, len(rows) - f - 1), krum_of_byzfl("MultiKrum")),
    "centered-clipping": (
        lambda rows, f: centered_clipping(rows, torch.zeros_like(rows[0]), 2.0, 3),
        lambda byzfl, f: byzfl.CenteredClipping(L=3, tau=2.0),
    ),
    "norm-bound": (
        lambda rows, f: norm_bound(rows, 2.0),
        lambda byzfl, f: lambda rows: np.mean(byzfl.Clipping(2.0)(rows.copy()), axis=0),
    ),
    "mixing": (mixed, lambda byzfl, f: byzfl.NNM(f)),
}
"""(our rule, byzfl's) of rows and the number of hostile clients."""

BYZFL = {
    "coordinate-median": [0.5, 0.5, -1.0, -0.5],
    "trimmed-mean": [1.5, 0.5, -1.25, -0.25],
    "geometric-median": [0.957383719276, 0.725005401474, -0.750269972441, -0.355543059223],
    "krum": [-1.0, 0.0, 0.0, -1.0],
    "multi-krum": [2.0, 0.6, -1.8, -0.8],
    "centered-clipping": [0.618808077883, 0.516494473247, -0.48760466766, -0.311000489459],
    "norm-bound": [0.294438291392, 0.253378817446, -0.222135078827, -0.146689538916],
}
"""What byzfl 0.0.11 makes of ROWS with two hostile clients."""


@pytest.mark.parametrize("name", BYZFL)
def test_a_rule_has_the_figures_of_byzfl(name: str) -> None:
    ours = PAIRS[name][0](torch.from_numpy(ROWS), HOSTILE)
    assert ours.tolist() == pytest.approx(BYZFL[name], abs=1e-9)


@pytest.mark.parametrize("clients", [7, 10, 15])
@pytest.mark.parametrize("name", PAIRS)
def test_a_rule_is_byzfls_on_drawn_rows(name: str, clients: int) -> None:
    pytest.importorskip("byzfl", reason="an oracle of the extra dev")
    import byzfl

    ours, theirs = PAIRS[name]
    rows = drawn(clients)
    expected = torch.from_numpy(np.asarray(theirs(byzfl, HOSTILE)(rows.copy())))
    torch.testing.assert_close(ours(torch.from_numpy(rows), HOSTILE), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("clients", [7, 10, 15])
def test_medians_are_numpys_and_scipys(clients: int) -> None:
    rows = drawn(clients)
    given = torch.from_numpy(rows)
    np.testing.assert_allclose(coordinate_median(given), np.median(rows, axis=0), atol=1e-12)
    trimmed = scipy.stats.trim_mean(rows, HOSTILE / clients + 1e-9, axis=0)
    np.testing.assert_allclose(trimmed_mean(given, HOSTILE), trimmed, atol=1e-12)
    nearest = scipy.optimize.minimize(
        lambda z: np.linalg.norm(rows - z, axis=1).sum(), rows.mean(0), method="BFGS", options={"gtol": 1e-9}
    )
    np.testing.assert_allclose(geometric_median(given, 1e-9, 500), nearest.x, atol=1e-5)


@pytest.mark.parametrize("sent", [0.0, 1e-9])
def test_clients_that_send_nothing_do_not_hold_the_geometric_median(sent: float) -> None:
    """From zero, where the paper begins, one of them did: its weight there is 1 / smoothing."""
    rows = np.random.default_rng(5).normal(1.0, 2.0, size=(20, 40))
    rows[:4] = sent
    found = geometric_median(torch.from_numpy(rows), 1e-6, 8).numpy()
    nearest = scipy.optimize.minimize(
        lambda z: np.linalg.norm(rows - z, axis=1).sum(), rows.mean(0), method="BFGS", options={"gtol": 1e-9}
    )
    assert np.linalg.norm(found - nearest.x) < 0.01 * np.linalg.norm(nearest.x)


def record(row: np.ndarray) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"w": Array(row)})})


@pytest.mark.parametrize("clients", [7, 11, 15])
def test_multi_krum_selects_whom_flower_selects(clients: int) -> None:
    rows = drawn(clients)
    contents = [record(row) for row in rows]
    chosen = select_multikrum(contents, HOSTILE, clients - HOSTILE)
    expected = np.mean([rows[contents.index(content)] for content in chosen], axis=0)
    np.testing.assert_allclose(multi_krum(torch.from_numpy(rows), HOSTILE), expected, atol=1e-12)


def krum_by_definition(rows: np.ndarray, hostile: int) -> int:
    """The place with the least sum over any n - f - 2 other rows: the nearest are the least."""
    count = max(1, len(rows) - hostile - 2)
    scores = []
    for i in range(len(rows)):
        squares = [float(((rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows)) if j != i]
        scores.append(min(sum(some) for some in combinations(squares, count)))
    return int(np.argmin(scores))


@pytest.mark.parametrize(("clients", "hostile"), [(7, 1), (11, 2), (12, 2)])
def test_bulyan_chooses_by_krum_and_trims_as_flower_does(clients: int, hostile: int) -> None:
    rows = drawn(clients, numbers=6)
    left = list(range(clients))
    for _ in range(clients - 2 * hostile):
        left.pop(krum_by_definition(rows[left], hostile))
    chosen = [i for i in range(clients) if i not in left]
    given = torch.from_numpy(rows)
    assert krum_choice(given, hostile, clients - 2 * hostile) == chosen
    reference = np.median(rows[chosen], axis=0)
    trimmed = aggregate_n_closest_weights([reference], [[row] for row in rows[chosen]], clients - 4 * hostile)
    np.testing.assert_allclose(bulyan(given, hostile), trimmed[0], atol=1e-12)


def test_krum_goes_by_the_definition_and_mixing_by_hand() -> None:
    rows = torch.from_numpy(ROWS)
    assert krum(rows, HOSTILE).tolist() == ROWS[krum_by_definition(ROWS, HOSTILE)].tolist()
    line = torch.tensor([[0.0], [1.0], [3.0], [100.0]], dtype=torch.float64)
    assert mixed(line, 2).tolist() == [[0.5], [0.5], [2.0], [51.5]]  # (0+1)/2, (1+0)/2, (3+1)/2, (100+3)/2


NAMES = ["a", "b", "c", "d", "e", "f", "g"]
MODEL = {"w": torch.zeros(2, 3), "b": torch.zeros(1)}


def updates(rows: np.ndarray, counts: list[int] | None = None) -> list[Update]:
    """One update a row of seven numbers."""
    given = torch.from_numpy(rows).float()
    return [
        Update(NAMES[i], 1, {"w": row[:6].reshape(2, 3), "b": row[6:]}, (counts or [5] * len(rows))[i])
        for i, row in enumerate(given)
    ]


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("name", HOSTILE_OPTIONS)
def test_a_stack_merges_to_the_bits_of_single_updates_whatever_they_say_of_examples(
    name: str, mixing: bool
) -> None:
    if mixing and name == "flanders":
        return  # a delta is held against its client's own past, so that none is mixed before
    section = StrategySection(name=name, lr=0.5, options={"mixing": True} if mixing else {})
    single = updates(drawn(7, 7))
    results = []
    for merged in (single, stacked(single), updates(drawn(7, 7), [1, 1, 1, 1, 1, 1, 10**9])):
        strategy = build_strategy(section)
        results.append(strategy.merge(MODEL, merged, strategy.begin(MODEL))[0])
    for other in results[1:]:
        assert all(torch.equal(other[tensor], results[0][tensor]) for tensor in MODEL)


@pytest.mark.parametrize("name", sorted(set(HOSTILE_OPTIONS) - {"norm-bound", "centered-clipping"}))
def test_one_hostile_client_of_seven_leaves_the_merge_among_the_honest(name: str) -> None:
    rows = np.random.default_rng(3).normal(size=(7, 7))
    rows[4] = 1e4
    strategy = build_strategy(StrategySection(name=name))
    model, _ = strategy.merge(MODEL, updates(rows), strategy.begin(MODEL))
    honest = np.delete(rows, 4, axis=0)
    merged = torch.cat([model["w"].reshape(-1), model["b"]]).double().numpy()
    assert np.all(merged >= honest.min(0) - 1e-6) and np.all(merged <= honest.max(0) + 1e-3)


@given(st.floats(1.0, 1e5), st.sampled_from(["norm-bound", "centered-clipping"]))
def test_no_client_moves_a_clipped_merge_by_more_than_its_share(size: float, name: str) -> None:
    rows = np.zeros((7, 7))
    rows[2, 1] = size
    strategy = build_strategy(StrategySection(name=name, options={"clipping_norm": 0.7}))
    model, _ = strategy.merge(MODEL, updates(rows), strategy.begin(MODEL))
    assert model["w"][0, 1].item() == pytest.approx(0.1)  # 0.7 / 7


def test_centered_clipping_goes_on_from_the_last_merge() -> None:
    strategy = build_strategy(StrategySection(name="centered-clipping"))
    model, state = {"w": torch.zeros(1)}, {"centre": torch.zeros(1, dtype=torch.float64)}
    three = [Update(name, 1, {"w": torch.tensor([5.0])}, 1) for name in "abc"]
    model, state = strategy.merge(model, three, state)  # v = 0 + 1
    model, state = strategy.merge(model, three, state)  # v = 1 + 1
    assert (model["w"].item(), state["centre"].tolist()) == (3.0, [2.0])


def test_too_few_updates_for_the_hostile_ones_end_the_run_in_one_line() -> None:
    strategy = build_strategy(StrategySection(name="krum", options={"hostile": 3}))
    with pytest.raises(InconsistentUpdates, match=r"7 updates to merge, expected at least 9 \(2 \* hostile"):
        strategy.merge(MODEL, updates(drawn(7, 7)), {})
