"""Exact samples of integers from a discrete Gaussian distribution, without floating point.

The discrete Gaussian of a variance gives each integer x a probability proportional to
f(x) = exp(-x^2 / (2 variance)) (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for
Differential Privacy", arXiv 2004.00010, definition 1). They sample it by rejection from a discrete
Laplace distribution; here proposals come from a table, so that nearly every number needs only one random
word of 64 bits.

Why it is exact. Write x = y for a sign bit of 0 and x = -1 - y for 1, with y >= 0: every integer has one
sign and one y. The y below a bound T = cells * width are divided into cells of equal width, a power of two.
There are 2^16 slots, and slots[c] of them belong to cell c. The bits of a word give a slot, a sign and an
offset in the slot's cell, so x is proposed with probability slots[c] / (2^17 width) exactly. It is accepted
with probability scale * f(x) / slots[c], so the product is proportional to f(x) whatever the slots are. The
acceptance probability is at most 1 because slots[c] >= scale * f(c width), and f(c width) is the largest f in
the cell. The y from T on are divided into blocks of equal width, a power of two: block j is proposed with
probability 2^-(j + 1), and f falls by more than half from one block to the next, so a bound on f in the first
block yields bounds in all of them. After a rejection the next proposal uses new words.

A number is accepted with probability p by drawing a uniform number U in [0, 1), bit by bit, and testing
whether U < p; p is known by integer bounds from below and above. If the bits drawn so far and the bounds
don't decide, both are refined. This is no approximation, because no answer is given before it is certain
(Karney 2016, "Sampling exactly from the normal distribution", arXiv 1303.6257, draws bits in the same way).
Three stages give the same answer at increasing cost:

1. U's first bits, which are left over in the word, are below the smallest p of the cell: in 98 of 100 cases;
2. U's first 30 bits against 1 - e + e^2/2 - e^3/6 <= exp(-e) <= 1 - e + e^2/2, where e is the increase of
   x^2 / (2 variance) since the cell's start: all but about one in a million of the rest;
3. all bits drawn, and more, against bounds of arbitrary precision, in Python's integers.

The running time depends on the numbers drawn, as with every rejection sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from atoll.privacy.noise import RandomBits

SLOT_BITS = 16
"""The word's highest bits, which give the slot; then come the sign bit, the offset and U's first bits."""
CELL_BITS = 6
"""One standard deviation has 2^6 to 2^7 cells; fewer, of one number each, if the deviation is smaller."""
LARGEST_VARIANCE = 2**92
"""For variances below this, a word has at least 8 bits left for U."""
BATCH = 1 << 16
"""The number of words handled at once, so that intermediate arrays fit the processor's cache, or nearly."""
WORD = 64
TABLE = 96
"""Fractional bits of the bounds on f from which the table is made."""
MIDDLE = 30
"""Fractional bits in the second stage: products of two such numbers fit into 64 bits."""
ONE = 1 << MIDDLE
WORTHWHILE = 4
"""Fewer numbers than this skip the second stage, which would take longer to set up than it saves."""
PART = 16
"""Bits of an offset, as a fraction of the cell's width, that the second stage uses."""
RATE = 31
"""Fractional bits of width^2 / (2 variance) in the second stage."""

Bits = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Places = NDArray[np.intp]
Flags = NDArray[np.bool_]


def exponential(exponent: Fraction, bits: int) -> tuple[int, int]:
    """(lower, upper) integer bounds on 2^bits * exp(-exponent), which differ by a few at most.

    The exponent is halved until it is below 2^-5; the series of exp(+r), whose terms are positive, is
    rounded down for one bound and up for the other; the results are inverted and squared back.

    Raises:
        ValueError: the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"exponent must be >= 0, got {exponent}")
    return _exponential(exponent.numerator, exponent.denominator, bits)


def _exponential(numerator: int, denominator: int, bits: int) -> tuple[int, int]:
    """As `exponential`, of a ratio in any terms: a table's hundreds of exponents need no common divisors."""
    if numerator == 0:
        return 1 << bits, 1 << bits
    halvings = max(0, (numerator // denominator).bit_length() + 5)
    point = bits + halvings + 8
    r = (numerator << point) // (denominator << halvings)
    below = above = term_below = term_above = 1 << point
    order = 1
    while term_above > 1:
        term_below = (term_below * r >> point) // order
        term_above = -(-(term_above * (r + 1)) >> point) // order + 1
        below += term_below
        above += term_above
        order += 1
    above += 1  # The terms left out: each is less than half of the one before, which is 1 at most.
    low, high = (1 << 2 * point) // above, -((-1 << 2 * point) // below)
    for _ in range(halvings):
        low, high = low * low >> point, -(-high * high >> point)
    spare = point - bits
    return low >> spare, -(-high >> spare)


@dataclass(frozen=True)
class Proposal:
    """The table for one variance: which numbers are proposed how often, and bounds on accepting them."""

    variance: Fraction
    width_bits: int
    """log2 of a cell's width."""
    slots: tuple[int, ...]
    """The number of slots of each cell, and last that of the blocks from T on."""
    scale: int
    """scale * f(x) is at most the number of slots of x's cell."""
    block_bits: int
    """log2 of the width of the blocks from T on."""
    cell_of: NDArray[np.uint16]
    """The cell of each slot, [2^SLOT_BITS]."""
    surely: Bits
    """By cell: if U's first bits, as an integer, are below this, U is below all p of it; 0 for blocks."""
    at_start: tuple[Bits, Bits]
    """By cell: lower and upper bounds on p at the cell's start, times 2^MIDDLE."""
    rate: tuple[int, int] | None
    """Bounds on width^2 / (2 variance), times 2^RATE; None if it is too large for the second stage."""

    @property
    def bits(self) -> int:
        """How many of U's bits each word contains."""
        return WORD - SLOT_BITS - 1 - self.width_bits

    @property
    def end(self) -> int:
        """The number T at which the last cell ends."""
        return (len(self.slots) - 1) << self.width_bits


@lru_cache(maxsize=64)
def proposal_for(variance: Fraction) -> Proposal:
    """The table for a variance, cached; making one takes milliseconds.

    Raises:
        ValueError: the variance is not above 0 and below `LARGEST_VARIANCE`.
    """
    if not 0 < variance < LARGEST_VARIANCE:
        raise ValueError(f"variance must be > 0 and below 2^92, got {variance}")
    deviation = isqrt(int(variance)) + 1
    width_bits = max(0, (int(variance).bit_length() - 1) // 2 - CELL_BITS)
    cells = -(-9 * deviation // 2 >> width_bits)
    beyond = cells << width_bits
    over, under = variance.denominator, 2 * variance.numerator
    bounds = [_exponential((c << width_bits) ** 2 * over, under, TABLE) for c in range(cells + 1)]
    # f falls by more than half where beyond * block / variance >= 0.7 > ln 2.
    block_bits = 0
    while 10 * (beyond << block_bits) < 7 * variance:
        block_bits += 1
    tops = [high for _, high in bounds[:-1]]
    # The first block has half of the proposals from T on.
    tops.append(-(-(bounds[-1][1] << block_bits + 1) >> width_bits))
    scale, slots = _dealt(tops)
    return Proposal(
        variance,
        width_bits,
        tuple(slots),
        scale,
        block_bits,
        np.repeat(np.arange(cells + 1, dtype=np.uint16), slots),
        _column([_ratio(scale * bounds[c + 1][0], slots[c], 47 - width_bits)[0] for c in range(cells)]),
        (
            _column([_ratio(scale * bounds[c][0], slots[c], MIDDLE)[0] for c in range(cells)]),
            _column([_ratio(scale * bounds[c][1], slots[c], MIDDLE)[1] for c in range(cells)]),
        ),
        _rate(Fraction(1 << 2 * width_bits) / (2 * variance), cells),
    )


def _dealt(tops: list[int]) -> tuple[int, list[int]]:
    """(the largest scale for which the slots suffice, the cells' slots); the first cell gets the rest."""
    scale = (1 << SLOT_BITS + TABLE) // sum(tops)
    while sum(slots := [-(-scale * top >> TABLE) for top in tops]) > 1 << SLOT_BITS:
        scale -= 1
    slots[0] += (1 << SLOT_BITS) - sum(slots)
    return scale, slots


def _ratio(bound: int, slots: int, bits: int) -> tuple[int, int]:
    """2^bits * bound / slots, rounded down and up; `bound` has TABLE fractional bits."""
    return (bound << bits) // (slots << TABLE), -((-bound << bits) // (slots << TABLE))


def _column(numbers: list[int]) -> Bits:
    """The numbers as an array, followed by a 0 for the blocks from T on."""
    return np.array([*numbers, 0], dtype=np.uint64)


def _rate(rate: Fraction, cells: int) -> tuple[int, int] | None:
    """Bounds on the rate, times 2^RATE; None unless e stays below 1 in every cell."""
    if rate * (2 * cells + 1) > Fraction(63, 64):
        return None
    down = (rate.numerator << RATE) // rate.denominator
    return down, down + 1


def propose(table: Proposal, random_bits: Bits, into: Numbers) -> Places:
    """Write the number that each word proposes into `into`; returns where the first stage doesn't accept it.

    `random_bits` and `into` are [count]; the result holds indices into them.
    """
    bits = np.uint64(table.bits)
    cells = np.take(table.cell_of, (random_bits >> np.uint64(WORD - SLOT_BITS)).view(np.int64))
    numbers = random_bits >> bits
    numbers &= np.uint64((1 << table.width_bits) - 1)
    numbers |= cells.astype(np.uint64) << np.uint64(table.width_bits)
    # All bits set for a sign bit of 1: -1 - y is y with its bits inverted.
    signs = (random_bits << np.uint64(SLOT_BITS)).view(np.int64) >> np.int64(WORD - 1)
    np.bitwise_xor(numbers.view(np.int64), signs, out=into)
    first = random_bits & np.uint64((1 << table.bits) - 1)
    return np.flatnonzero(first >= np.take(table.surely, cells))


def judge(table: Proposal, numbers: Numbers, random_bits: Bits, further: Bits) -> tuple[Flags, Flags]:
    """The second stage: (which numbers are accepted, which are neither accepted nor rejected yet).

    All arrays are [count]. `random_bits` proposed the numbers; `further` has the bits of U after theirs.
    """
    if table.rate is None or len(numbers) < WORTHWHILE:
        return np.zeros(len(numbers), dtype=np.bool_), np.ones(len(numbers), dtype=np.bool_)
    cells = table.cell_of[random_bits >> np.uint64(WORD - SLOT_BITS)].astype(np.uint64)
    outside = cells == np.uint64(len(table.slots) - 1)
    offsets = np.abs(numbers).view(np.uint64) - (cells << np.uint64(table.width_bits))
    below, above = _more(table.rate, cells, _shifted(offsets, PART - table.width_bits))
    lowest, highest = _shrunk(below, above)
    lowest = lowest * table.at_start[0][cells] >> np.uint64(MIDDLE)
    highest = (highest * table.at_start[1][cells] >> np.uint64(MIDDLE)) + np.uint64(1)
    first = random_bits & np.uint64((1 << table.bits) - 1)
    uniform = _shifted(first, MIDDLE - table.bits)
    if table.bits < MIDDLE:
        uniform |= further >> np.uint64(WORD - MIDDLE + table.bits)
    accepted = (uniform < lowest) & ~outside
    return accepted, ~accepted & ((uniform < highest) | outside)


def _shifted(numbers: Bits, by: int) -> Bits:
    """The numbers shifted left by `by` bits, or right if `by` is negative."""
    return numbers << np.uint64(by) if by >= 0 else numbers >> np.uint64(-by)


def _more(rate: tuple[int, int], cells: Bits, part: Bits) -> tuple[Bits, Bits]:
    """Bounds on e = rate * t * (2 cell + t), times 2^MIDDLE; t = offset / width has PART bits."""
    shift = np.uint64(2 * PART + RATE - MIDDLE)
    twice = cells << np.uint64(PART + 1)
    after = part + np.uint64(1)
    below = part * (twice + part) * np.uint64(rate[0]) >> shift
    return below, (after * (twice + after) * np.uint64(rate[1]) >> shift) + np.uint64(1)


def _shrunk(below: Bits, above: Bits) -> tuple[Bits, Bits]:
    """Bounds on exp(-e), times 2^MIDDLE, from bounds on an e below 1."""
    one = np.uint64(ONE)
    square = above * above
    cube = ((square >> np.uint64(MIDDLE)) + np.uint64(1)) * above // np.uint64(6 << MIDDLE)
    lowest = one - above + (square >> np.uint64(MIDDLE + 1)) - cube - np.uint64(1)
    return lowest, one - below + (below * below >> np.uint64(MIDDLE + 1)) + np.uint64(1)


def is_below(
    factor: Fraction, exponent: Fraction, bits: int, count: int, following: Callable[[], int]
) -> bool:
    """Whether U < factor * exp(-exponent), for a U whose first `count` bits are the integer `bits`.

    `following()` returns the next word of U's bits, and is called as often as needed.
    """
    while True:
        low, high = exponential(exponent, count + 8)
        if (bits + 1) * factor.denominator << 8 <= low * factor.numerator:
            return True
        if bits * factor.denominator << 8 >= high * factor.numerator:
            return False
        bits = bits << WORD | following()
        count += WORD


@dataclass(frozen=True)
class DiscreteGaussian:
    """Draws independent integers from the discrete Gaussian of mean 0, exactly.

    `variance` is the parameter of the definition, in squared grid steps; the variance of the numbers is no
    larger, and equal up to one part in 10^70 for standard deviations of 3 or more. `source` must return new
    random words with every call; the same words give the same numbers.

    Raises:
        ValueError: the variance is not above 0 and below `LARGEST_VARIANCE`.
    """

    variance: Fraction
    source: RandomBits

    def __post_init__(self) -> None:
        proposal_for(self.variance)

    def draw(self, count: int) -> Numbers:
        """`count` numbers, int64, [count]; splitting a draw into several calls gives the same numbers."""
        table = proposal_for(self.variance)
        drawn = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            numbers = _tried(table, self.source, min(BATCH, count - done))
            drawn[done : done + len(numbers)] = numbers
            done += len(numbers)
        return drawn


def _tried(table: Proposal, source: RandomBits, count: int) -> Numbers:
    """The numbers accepted from `count` words, and from further words if the last number needs more bits.

    Words are read in order: one word proposes a number, and if its bits don't decide whether the number is
    accepted, the words after it do. So drawing many numbers uses the same words as drawing one at a time.
    """
    random_bits = source(count)
    numbers = np.empty(count, dtype=np.int64)
    places = propose(table, random_bits, numbers)
    if not places.size:
        return numbers
    after = np.minimum(places + 1, count - 1)
    accepted, still_open = judge(table, numbers[places], random_bits[places], random_bits[after])
    still_open[after == places] = True
    left_out: list[int] = []
    free = 0
    for place, is_accepted, is_open in zip(
        places.tolist(), accepted.tolist(), still_open.tolist(), strict=True
    ):
        if place < free:
            continue  # This word's bits were used by an earlier number.
        free = place + 2
        if is_open:
            following = Following(random_bits, place + 1, source)
            numbers[place], is_accepted = settle(
                table, int(random_bits[place]), int(numbers[place]), following
            )
            free = following.place
        left_out.extend(range(place + is_accepted, free))
    stays = np.ones(max(count, free), dtype=np.bool_)
    stays[left_out] = False
    return numbers[stays[:count]]


class Following:
    """Returns one word at a time: the words from `place` on, then new ones from the source."""

    def __init__(self, random_bits: Bits, place: int, source: RandomBits) -> None:
        self.random_bits = random_bits
        self.place = place
        self.source = source

    def __call__(self) -> int:
        word = self.random_bits[self.place] if self.place < len(self.random_bits) else self.source(1)[0]
        self.place += 1
        return int(word)


def settle(table: Proposal, word: int, number: int, following: Callable[[], int]) -> tuple[int, bool]:
    """The third stage: (the number, whether it is accepted); a number from T on is proposed here."""
    cell = int(table.cell_of[word >> WORD - SLOT_BITS])
    bits, count = following(), WORD
    if cell == len(table.slots) - 1:
        number, factor = beyond(table, following)
        if word >> WORD - SLOT_BITS - 1 & 1:
            number = -1 - number
    else:
        factor = Fraction(table.scale, table.slots[cell])
        bits |= (word & ((1 << table.bits) - 1)) << WORD
        count += table.bits
    return number, is_below(factor, number**2 / (2 * table.variance), bits, count, following)


def beyond(table: Proposal, following: Callable[[], int]) -> tuple[int, Fraction]:
    """(a number proposed from T on, the factor that makes f its acceptance probability)."""
    block = 0
    while (word := following()) == 0:
        block += WORD
    block += WORD - word.bit_length()
    offset = following() >> WORD - table.block_bits
    factor = Fraction(table.scale << table.block_bits + block + 1, table.slots[-1] << table.width_bits)
    return table.end + (block << table.block_bits) + offset, factor
