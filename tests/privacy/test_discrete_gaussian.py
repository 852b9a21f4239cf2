"""The discrete Gaussian's sampler: its exact probabilities, its words, and that it computes in whole numbers.

The sampler is taken as a box: words go in, a number comes out or the words run out. Which share of all
U accepts a proposal is found by halving on the words themselves, to 2^-89 or better.
"""

import ast
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from scipy import stats

import atoll.privacy.discrete_gaussian as sampler
from atoll.privacy.discrete_gaussian import DiscreteGaussian, exponential, is_below, proposal_for
from atoll.privacy.noise import entropy, seeded

LARGE = Fraction(13, 10) * 2**28
"""A deviation as the lattice has them."""


class Exhausted(Exception):
    """The sampler asked for more words than there are."""


def scripted(words: list[int]) -> Callable[[int], np.ndarray]:
    left = list(words)

    def give(count: int) -> np.ndarray:
        if count > len(left):
            raise Exhausted
        given = [left.pop(0) for _ in range(count)]
        return np.array(given, dtype=np.uint64)

    return give


def one_by_one(words: list[int]) -> Callable[[], int]:
    source = scripted(words)
    return lambda: int(source(1)[0])


def outcome(variance: Fraction, words: list[int]) -> int | None:
    """The number that these words give, or none if the first was rejected or they are too few.

    Two are given at once, for otherwise the second stage would be left out; but not where the first does.
    """
    for count in (1, 2):
        try:
            numbers = sampler._tried(
                sampler.proposal_for(variance), scripted(words[:1] if count == 1 else words), count
            )
            return int(numbers[0]) if len(numbers) else None
        except Exhausted:
            continue
    return None


def accepted_share(accepts: Callable[[int], bool], bits: int) -> Fraction:
    """The share of all U of so many bits that is accepted, by halving: those accepted lie lowest."""
    low, high = 0, 1 << bits
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if accepts(middle) else (low, middle)
    return Fraction(low, 1 << bits)


def mass(variance: Fraction, head: int, slots: int) -> tuple[int, Decimal]:
    """The number that a word with this slot, sign and offset proposes, and slots * (share accepted)."""
    first = proposal_for(variance).bits
    number = outcome(variance, [head << first, 0])
    assert number is not None

    def accepts(u: int) -> bool:
        return outcome(variance, [head << first | u >> 64, u & (1 << 64) - 1]) == number

    return number, slots * decimal(accepted_share(accepts, first + 64))


def decimal(number: Fraction) -> Decimal:
    return Decimal(number.numerator) / Decimal(number.denominator)


def definition(variance: Fraction, number: int) -> Decimal:
    return (-decimal(Fraction(number * number) / (2 * variance))).exp()


@pytest.fixture(autouse=True)
def every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single numbers pass the second stage too."""
    monkeypatch.setattr(sampler, "WORTHWHILE", 0)


@pytest.fixture(autouse=True)
def digits() -> Iterator[None]:
    with localcontext() as context:
        context.prec = 60
        yield


def check_masses(variance: Fraction, heads: list[tuple[int, int]]) -> None:
    """That the masses of (slot, sign, offset)s and their slots are to each other as f is.

    What halving leaves open of a mass is a share of 2^-(U's bits) of its slots.
    """
    masses = dict(mass(variance, head, slots) for head, slots in heads)
    assert len(masses) == len(heads)
    left_open = 2 * max(slots for _, slots in heads) * Decimal(2) ** -(proposal_for(variance).bits + 64)
    for number, found in masses.items():
        assert abs(found - masses[0] * definition(variance, number)) <= left_open, number


def all_heads(variance: Fraction) -> list[tuple[int, int]]:
    """(Slot, sign) of each cell and sign, for cells of one number, with how many slots the cell has.

    Counted by what comes out of all 2^17 of them.
    """
    first = proposal_for(variance).bits
    assert proposal_for(variance).width_bits == 0
    heads = np.arange(1 << 17, dtype=np.uint64)
    numbers = np.empty(len(heads), dtype=np.int64)
    sampler.propose(proposal_for(variance), heads << np.uint64(first), numbers)
    inside = np.where(numbers < 0, -1 - numbers, numbers) < proposal_for(variance).end
    slots = Counter(numbers[inside].tolist())
    some = dict(zip(numbers[inside].tolist(), heads[inside].tolist(), strict=True))
    assert sum(slots.values()) < 1 << 17
    return [(some[number], slots[number]) for number in slots]


def some_heads(variance: Fraction, count: int) -> list[tuple[int, int]]:
    """As many (slot, sign, offset)s of as many cells as can be, that of zero among them."""
    table = proposal_for(variance)
    chosen = random.Random(5)
    slots = Counter(table.cell_of.tolist())
    found = [(0, slots[0])]
    for cell in np.linspace(0, len(table.slots) - 2, count).astype(int).tolist():
        slot = int(np.flatnonzero(table.cell_of == cell)[0])
        below = chosen.randrange(1, 2 << table.width_bits)
        found.append((slot << table.width_bits + 1 | below, slots[cell]))
    return found


SMALL = [Fraction(1, 4), Fraction(2), Fraction(16, 3), Fraction(100)]


@pytest.mark.parametrize("variance", SMALL, ids=str)
def test_every_numbers_probability_is_the_definitions(variance: Fraction) -> None:
    check_masses(variance, all_heads(variance))


@pytest.mark.parametrize("deviation", [Fraction(130), LARGE, Fraction(2) ** 40], ids=str)
def test_numbers_of_every_cell_have_the_definitions_probability(deviation: Fraction) -> None:
    check_masses(deviation**2, some_heads(deviation**2, 40))


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(2), Fraction(16, 3), LARGE**2], ids=str)
def test_numbers_beyond_the_cells_have_the_definitions_probability_too(variance: Fraction) -> None:
    """Word by word: the slot and sign, U, the block as its leading zeros, the offset, more of U."""
    table = proposal_for(variance)
    chosen = random.Random(6)
    slots = int((table.cell_of == len(table.slots) - 1).sum())
    slot = int(np.flatnonzero(table.cell_of == len(table.slots) - 1)[0])
    _, at_zero = mass(variance, 0, int((table.cell_of == 0).sum()))
    for block, sign in [(0, 0), (0, 1), (1, 0), (2, 1), (5, 0)]:
        offset = chosen.randrange(1 << table.block_bits)
        head = [slot << 48 | sign << 47]
        at = [(1 << 63 - block) | chosen.randrange(1 << 63 - block), offset << 64 - table.block_bits]
        y = table.end + (block << table.block_bits) + offset
        number = -1 - y if sign else y

        def accepts(u: int, head: list[int] = head, at: list[int] = at, number: int = number) -> bool:
            lower = [u >> bits & (1 << 64) - 1 for bits in (256, 192, 128, 64, 0)]
            return outcome(variance, [*head, u >> 320, *at, *lower]) == number

        share = decimal(accepted_share(accepts, 384))
        # Of this slot's words, one in 2^(block + 1) has the block, and one in its width the offset.
        found = slots * share / 2 ** (block + 1) / 2**table.block_bits
        expected = at_zero * definition(variance, number) / 2**table.width_bits
        assert abs(found / expected - 1) < Decimal(2) ** -65


def accept_all(table: Any, numbers: Any, words: Any, further: Any) -> Any:
    return np.ones(len(numbers), dtype=np.bool_), np.zeros(len(numbers), dtype=np.bool_)


def one_more(name: str, by: int) -> Callable[[Fraction], sampler.Proposal]:
    def broken(variance: Fraction) -> sampler.Proposal:
        table = proposal_for(variance)
        return dataclasses.replace(table, **{name: getattr(table, name) + np.uint64(by)})

    return broken


def upper_bound_twice(below: Any, above: Any, honest: Any = sampler._shrunk) -> Any:
    return honest(below, above)[1], honest(below, above)[1]


def rounded_once(factor: Fraction, exponent: Fraction, bits: int, count: int, words: Any) -> bool:
    """Decides with what it has, as a sampler with thresholds of so many bits would."""
    return Fraction(bits, 1 << count) < factor * Fraction(exponential(exponent, 62)[0], 1 << 62)


SABOTAGED = {
    "the acceptance step": (sampler, "judge", accept_all),
    "the acceptance step of single numbers": (
        sampler,
        "settle",
        lambda table, word, number, more: (number, True),
    ),
    "the first stage, by one": (sampler, "proposal_for", one_more("surely", 1)),
    "the second stage's bounds": (sampler, "_shrunk", upper_bound_twice),
    "the third stage, rounded to 62 bits": (sampler, "is_below", rounded_once),
}


@pytest.mark.parametrize("what", SABOTAGED)
def test_a_sampler_that_leaves_something_out_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variance = Fraction(100)
    heads = all_heads(variance)[::3]
    check_masses(variance, heads[:5])
    monkeypatch.setattr(*SABOTAGED[what])
    with pytest.raises(AssertionError):
        check_masses(variance, heads)


EXPONENTS = ["0", "1/1000000007", "1/3", "1", "5/2", "31/7", "40", "1000", "100000"]


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("bits", [1, 8, 64, 150])
def test_bounds_of_an_exponential_enclose_it_closely(exponent: str, bits: int) -> None:
    low, high = exponential(Fraction(exponent), bits)
    truth = (-decimal(Fraction(exponent))).exp() * Decimal(2) ** bits
    assert low <= truth <= high
    assert high - low <= (0 if exponent == "0" else 2)


def test_no_exponential_of_a_negative_exponent() -> None:
    with pytest.raises(ValueError, match="exponent must be >= 0, got -1/2"):
        exponential(Fraction(-1, 2), 64)


@pytest.mark.parametrize("exponent", EXPONENTS[1:-2])
@pytest.mark.parametrize("factor", [Fraction(1), Fraction(5, 7)])
def test_a_trial_succeeds_with_its_probability(exponent: str, factor: Fraction) -> None:
    def accepts(u: int) -> bool:
        try:
            return is_below(factor, Fraction(exponent), u >> 64, 64, one_by_one([u & (1 << 64) - 1]))
        except Exhausted:
            return False

    share = accepted_share(accepts, 128)
    truth = decimal(factor) * (-decimal(Fraction(exponent))).exp()
    assert abs(decimal(share) - truth) <= Decimal(2) ** -127


@pytest.mark.parametrize("variance", [Fraction(2), Fraction(100), LARGE**2], ids=str)
def test_where_words_do_not_tell_further_words_do(variance: Fraction) -> None:
    """U's first bits are those of the very threshold: three stages can't tell, one more word can."""
    bits = proposal_for(variance).bits + 64
    head = 1 if variance < 10**6 else 12345

    def result(u: int, more: list[int]) -> int | None:
        return outcome(variance, [head << bits - 64 | u >> 64, u & (1 << 64) - 1, *more])

    number = result(0, [])
    assert number is not None
    threshold = int(accepted_share(lambda u: result(u, []) == number, bits) * 2**bits)
    ambiguous = [
        u for u in range(threshold - 2, threshold + 3) if result(u, []) is None and result(u, [0]) == number
    ]
    assert len(ambiguous) == 1
    assert result(ambiguous[0], [(1 << 64) - 1]) is None
    assert result(ambiguous[0] - 1, []) == number and result(ambiguous[0] + 1, [0] * 9) != number


@pytest.mark.parametrize(
    "deviation", [Fraction(1, 2), Fraction(17, 10), Fraction(31), Fraction(333)], ids=str
)
def test_counts_fit_the_definition(deviation: Fraction) -> None:
    count = 20_000 if deviation < 8 else 200_000
    drawn = DiscreteGaussian(deviation**2, seeded(3)).draw(count)
    furthest = int(8 * deviation) + 1
    weights = np.exp(-(np.arange(-furthest, furthest + 1) ** 2) / (2 * float(deviation) ** 2))
    expected = count * weights / weights.sum()
    found = np.bincount(np.clip(drawn, -furthest, furthest) + furthest, minlength=2 * furthest + 1)
    common = expected >= 5
    pairs = [(found[common], expected[common]), ([found[~common].sum()], [expected[~common].sum()])]
    statistic = sum(float(((np.array(f) - e) ** 2 / np.array(e)).sum()) for f, e in pairs)
    assert 1e-3 < stats.chi2.sf(statistic, common.sum()) < 1 - 1e-3


def test_with_a_large_deviation_it_is_a_normal_distribution() -> None:
    count = 200_000
    drawn = DiscreteGaussian(LARGE**2, seeded(4)).draw(count) / float(LARGE)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    edges = stats.norm.ppf(np.linspace(0, 1, 1001)[1:-1])
    found = np.bincount(np.searchsorted(edges, drawn), minlength=1000)
    assert 1e-3 < stats.chisquare(found).pvalue < 1 - 1e-3


def test_moments_and_lowest_bits_with_a_large_deviation() -> None:
    count = 400_000
    whole = DiscreteGaussian(LARGE**2, seeded(5)).draw(count)
    drawn = whole / float(LARGE)
    # Deviations of the mean of x, x^2, x^3, x^4: of moments 1, 2, 15, 96.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((drawn**power).mean()) - expected) < 4 * (variance / count) ** 0.5
    assert stats.chisquare(np.bincount(whole & 255, minlength=256)).pvalue > 1e-3
    assert (np.abs(drawn) > 4.6).any(), "none of those beyond the last cell was drawn"


def test_the_same_words_give_the_same_numbers_and_are_as_many() -> None:
    calls: list[list[int]] = [[], []]
    results = []
    for k in range(2):
        source = seeded(9)

        def counted(count: int, k: int = k, source: Any = source) -> np.ndarray:
            calls[k].append(count)
            words: np.ndarray = source(count)
            assert words.dtype == np.uint64
            return words

        results.append(DiscreteGaussian(LARGE**2, counted).draw(30_000))
    assert (results[0] == results[1]).all() and results[0].dtype == np.int64
    assert calls[0] == calls[1]
    assert 30_000 < sum(calls[0]) < 32_000


@pytest.mark.parametrize("leap", ["WORTHWHILE", "BATCH"])
def test_how_it_is_computed_does_not_show(leap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second stage, or with other batches, the same words give the same numbers."""
    expected = DiscreteGaussian(LARGE**2, seeded(10)).draw(20_000)
    monkeypatch.setattr(sampler, leap, {"WORTHWHILE": 10**6, "BATCH": 999}[leap])
    assert (DiscreteGaussian(LARGE**2, seeded(10)).draw(20_000) == expected).all()


@pytest.mark.parametrize("variance", [Fraction(2), Fraction(100), LARGE**2], ids=str)
def test_numbers_drawn_in_parts_are_those_drawn_at_once(variance: Fraction) -> None:
    """A client's steps take their noise one by one or all together, from one source of words."""
    whole, parts = seeded(11), seeded(11)
    at_once = DiscreteGaussian(variance, whole).draw(5000)
    box = DiscreteGaussian(variance, parts)
    sizes = [1] * 500 + [7, 93, 0, 400, 3000, 1000]
    assert (np.concatenate([box.draw(size) for size in sizes]) == at_once).all()
    assert (whole(3) == parts(3)).all()


def test_numbers_drawn_once_are_not_drawn_again() -> None:
    box = DiscreteGaussian(LARGE**2, entropy)
    assert (box.draw(1000) == box.draw(1000)).sum() <= 1
    assert box.draw(0).size == 0


def is_float(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(is_float(v) for v in value[:8])
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind not in "iub"
    return isinstance(value, float | complex)


@pytest.mark.parametrize("variance", [Fraction(16, 3), LARGE**2], ids=str)
def test_no_number_in_it_is_ever_a_float(variance: Fraction) -> None:
    """Every local of every function of the module, after every line, from building the table on."""
    floats: list[str] = []
    functions: set[str] = set()

    def watch(frame: FrameType, event: str, value: object) -> Any:
        if frame.f_code.co_filename != sampler.__file__:
            return None
        functions.add(frame.f_code.co_name)
        seen = {**frame.f_locals, **({"return": value} if event == "return" else {})}
        floats.extend(f"{frame.f_code.co_name}: {name}" for name, local in seen.items() if is_float(local))
        return watch

    proposal_for.cache_clear()
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        DiscreteGaussian(variance, seeded(1)).draw(1000 if variance < 100 else 200_000)
    finally:
        sys.settrace(before)
    assert floats == []
    expected = {
        "propose",
        "judge",
        "is_below",
        "exponential",
        "_exponential",
        "proposal_for",
        "_dealt",
        "_rate",
    }
    assert expected | ({"beyond", "_shrunk", "_more"} if variance > 100 else set()) <= functions


def test_its_source_names_no_float() -> None:
    assert sampler.__file__ is not None
    tree = ast.parse(Path(sampler.__file__).read_text("utf-8"))
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), node.lineno
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert "float" not in name and name not in {"exp", "log", "sqrt", "double", "math"}
        if isinstance(node, ast.ImportFrom) and node.module == "math":
            assert [alias.name for alias in node.names] == ["isqrt"]


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(2**92)], ids=str)
def test_a_variance_out_of_range_is_refused(variance: Fraction) -> None:
    with pytest.raises(ValueError, match="variance must be > 0 and below"):
        DiscreteGaussian(variance, entropy)
