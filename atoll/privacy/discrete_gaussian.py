"""Whole numbers from a discrete Gaussian, sampled exactly and without floating point.

The discrete Gaussian of a variance gives each whole number x a probability proportional to
f(x) = exp(-x^2 / (2 variance)) (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for
Differential Privacy", arXiv 2004.00010, definition 1). They sample it by rejection from a discrete
Laplace distribution; here the proposal is a table, so that nearly every number costs one random word.

Why it is exact. Write x = y for a sign bit of 0 and x = -1 - y for 1, with y >= 0: every whole number
has one sign and one y. The y below a bound T = cells * width are cut into cells of one width, a power
of two, and 2^16 slots are dealt to them: cell c gets slots[c] of them. A slot, a sign and an offset in
the cell are bits of a word, thus x is proposed with probability slots[c] / (2^17 width) exactly, and
is accepted with probability scale * f(x) / slots[c]. The product is proportional to f(x) whatever the
slots are, and the probability is 1 at most since slots[c] >= scale * f(c width), which is the largest f
of a cell. Beyond T lie blocks of one width, a power of two: block j is proposed with probability
2^-(j + 1), and f falls by more than half from one to the next, so that what bounds f in the first block
bounds it in all. Whoever is rejected tries again with fresh words.

Accepting with probability p means that a uniform number U in [0, 1), of which ever more bits are
drawn, is below p; p is known by bounds from below and above, in whole numbers. Where the bits drawn
and the bounds do not tell, both are refined: this is no approximation, for no answer is given before
it is certain (Karney 2016, "Sampling exactly from the normal distribution", arXiv 1303.6257, draws
its bits likewise). Three stages give the same answer at rising cost:

1. U's first bits, left over in the word, lie below the smallest p of the cell: they do in 98 of 100 cases;
2. U's first 30 bits against 1 - e + e^2/2 - e^3/6 <= exp(-e) <= 1 - e + e^2/2, where e is how
   much more x^2 / (2 variance) is than at the cell's start: all but about one in a million of the rest;
3. all bits drawn, and more, against bounds of any precision, in Python's integers.

How long it takes depends on what is drawn, as with every rejection.
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
"""Of a word, its uppermost: which slot. Next come the sign's bit, the offset and U's first bits."""
CELL_BITS = 6
"""A deviation is two to this power cells, and less than twice as many; or fewer, each of one number."""
LARGEST_VARIANCE = 2**92
"""Below it, offsets leave at least 8 of a word's bits for U."""
BATCH = 1 << 16
"""Words handled at once: what is computed of them stays in the processor's cache, or nearly."""
WORD = 64
TABLE = 96
"""Bits after the point of the bounds that the table is made of."""
MIDDLE = 30
"""Bits after the point in the second stage: products of two such numbers fit a word."""
ONE = 1 << MIDDLE
WORTHWHILE = 4
"""Fewer numbers than this go to the third stage at once: the second has more to set up than it saves."""
PART = 16
"""Bits to which the second stage knows an offset, as a part of the cell's width."""
RATE = 31
"""Bits after the point of width^2 / (2 variance) in the second stage."""

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Places = NDArray[np.intp]
Flags = NDArray[np.bool_]


def exponential(exponent: Fraction, bits: int) -> tuple[int, int]:
    """Whole numbers below and above 2^bits * exp(-exponent), a few apart at most.

    The exponent is halved until it is below 2^-5; the series of exp(+r), whose terms are positive, is
    rounded down for one bound and up for the other; the results are inverted and squared back.

    Raises:
        ValueError: the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"exponent must be >= 0, got {exponent}")
    if exponent == 0:
        return 1 << bits, 1 << bits
    halvings = max(0, int(exponent).bit_length() + 5)
    point = bits + halvings + 8
    r = (exponent.numerator << point) // (exponent.denominator << halvings)
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
    """What is proposed for a variance, how often, and the bounds for accepting it."""

    variance: Fraction
    width_bits: int
    """log2 of a cell's width."""
    slots: tuple[int, ...]
    """Of each cell, and at the end of what lies beyond the last."""
    scale: int
    """f(x) times this is at most the slots of x's cell."""
    block_bits: int
    """log2 of the width of the blocks beyond the last cell."""
    cell_of: NDArray[np.uint16]
    """[2^SLOT_BITS]"""
    surely: Words
    """Of each cell: U's first bits, read as a number below this, are below any p of the cell; 0 beyond."""
    at_start: tuple[Words, Words]
    """Of each cell: bounds of p at the cell's start, times 2^MIDDLE."""
    rate: tuple[int, int] | None
    """Bounds of width^2 / (2 variance), times 2^RATE; none if it is too large for the second stage."""

    @property
    def bits(self) -> int:
        """How many of U's bits come with a word."""
        return WORD - SLOT_BITS - 1 - self.width_bits

    @property
    def end(self) -> int:
        """The number T at which the last cell ends."""
        return (len(self.slots) - 1) << self.width_bits


@lru_cache(maxsize=64)
def proposal_for(variance: Fraction) -> Proposal:
    """The table for a variance; it takes milliseconds, and is kept.

    Raises:
        ValueError: the variance is not above 0 and below `LARGEST_VARIANCE`.
    """
    if not 0 < variance < LARGEST_VARIANCE:
        raise ValueError(f"variance must be > 0 and below 2^92, got {variance}")
    deviation = isqrt(int(variance)) + 1
    width_bits = max(0, (int(variance).bit_length() - 1) // 2 - CELL_BITS)
    cells = -(-9 * deviation // 2 >> width_bits)
    beyond = cells << width_bits
    bounds = [exponential(Fraction((c << width_bits) ** 2) / (2 * variance), TABLE) for c in range(cells + 1)]
    # f falls by more than half where beyond * block / variance >= 0.7 > ln 2.
    block_bits = 0
    while 10 * (beyond << block_bits) < 7 * variance:
        block_bits += 1
    tops = [high for _, high in bounds[:-1]]
    # The first block has half of what is beyond.
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
    """The largest scale whose slots suffice, and each cell's slots; the first cell gets those left over."""
    scale = (1 << SLOT_BITS + TABLE) // sum(tops)
    while sum(slots := [-(-scale * top >> TABLE) for top in tops]) > 1 << SLOT_BITS:
        scale -= 1
    slots[0] += (1 << SLOT_BITS) - sum(slots)
    return scale, slots


def _ratio(bound: int, slots: int, bits: int) -> tuple[int, int]:
    """A bound of TABLE bits over slots, with so many bits after the point: rounded down and up."""
    return (bound << bits) // (slots << TABLE), -((-bound << bits) // (slots << TABLE))


def _column(numbers: list[int]) -> Words:
    """With a 0 for what lies beyond."""
    return np.array([*numbers, 0], dtype=np.uint64)


def _rate(rate: Fraction, cells: int) -> tuple[int, int] | None:
    """Bounds, if e stays below one in every cell."""
    if rate * (2 * cells + 1) > Fraction(63, 64):
        return None
    down = (rate.numerator << RATE) // rate.denominator
    return down, down + 1


def propose(table: Proposal, words: Words, into: Numbers) -> Places:
    """Write the number that each word proposes, and say where the first stage doesn't accept it."""
    bits = np.uint64(table.bits)
    cells = np.take(table.cell_of, (words >> np.uint64(WORD - SLOT_BITS)).view(np.int64))
    numbers = words >> bits
    numbers &= np.uint64((1 << table.width_bits) - 1)
    numbers |= cells.astype(np.uint64) << np.uint64(table.width_bits)
    # All bits set for a sign bit of 1: -1 - y is y with its bits turned.
    signs = (words << np.uint64(SLOT_BITS)).view(np.int64) >> np.int64(WORD - 1)
    np.bitwise_xor(numbers.view(np.int64), signs, out=into)
    first = words & np.uint64((1 << table.bits) - 1)
    return np.flatnonzero(first >= np.take(table.surely, cells))


def judge(table: Proposal, numbers: Numbers, words: Words, further: Words) -> tuple[Flags, Flags]:
    """The second stage: which numbers are accepted, and for which that remains open.

    `words` proposed the numbers; `further` has the bits of U that follow theirs.
    """
    if table.rate is None or len(numbers) < WORTHWHILE:
        return np.zeros(len(numbers), dtype=np.bool_), np.ones(len(numbers), dtype=np.bool_)
    cells = table.cell_of[words >> np.uint64(WORD - SLOT_BITS)].astype(np.uint64)
    outside = cells == np.uint64(len(table.slots) - 1)
    offsets = np.abs(numbers).view(np.uint64) - (cells << np.uint64(table.width_bits))
    below, above = _more(table.rate, cells, _shifted(offsets, PART - table.width_bits))
    lowest, highest = _shrunk(below, above)
    lowest = lowest * table.at_start[0][cells] >> np.uint64(MIDDLE)
    highest = (highest * table.at_start[1][cells] >> np.uint64(MIDDLE)) + np.uint64(1)
    first = words & np.uint64((1 << table.bits) - 1)
    uniform = _shifted(first, MIDDLE - table.bits)
    if table.bits < MIDDLE:
        uniform |= further >> np.uint64(WORD - MIDDLE + table.bits)
    accepted = (uniform < lowest) & ~outside
    return accepted, ~accepted & ((uniform < highest) | outside)


def _shifted(numbers: Words, by: int) -> Words:
    """To the left, or to the right if negative."""
    return numbers << np.uint64(by) if by >= 0 else numbers >> np.uint64(-by)


def _more(rate: tuple[int, int], cells: Words, part: Words) -> tuple[Words, Words]:
    """Bounds of e = rate * t * (2 cell + t), times 2^MIDDLE, for a part t of the width with PART bits."""
    shift = np.uint64(2 * PART + RATE - MIDDLE)
    twice = cells << np.uint64(PART + 1)
    after = part + np.uint64(1)
    below = part * (twice + part) * np.uint64(rate[0]) >> shift
    return below, (after * (twice + after) * np.uint64(rate[1]) >> shift) + np.uint64(1)


def _shrunk(below: Words, above: Words) -> tuple[Words, Words]:
    """Bounds of exp(-e), times 2^MIDDLE, from those of an e below 1."""
    one = np.uint64(ONE)
    square = above * above
    cube = ((square >> np.uint64(MIDDLE)) + np.uint64(1)) * above // np.uint64(6 << MIDDLE)
    lowest = one - above + (square >> np.uint64(MIDDLE + 1)) - cube - np.uint64(1)
    return lowest, one - below + (below * below >> np.uint64(MIDDLE + 1)) + np.uint64(1)


def is_below(
    factor: Fraction, exponent: Fraction, bits: int, count: int, following: Callable[[], int]
) -> bool:
    """Whether U < factor * exp(-exponent), for a U that begins with so many bits, read as a whole number.

    The bits after them are those of the following words, if they are needed.
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
    """Independent whole numbers from the discrete Gaussian of mean 0, exactly.

    The variance is that of the definition, in squared grid steps: the numbers' own is no larger, and the
    same to a part in 10^70 from a deviation of 3 on. `words` must give fresh words with every call; the
    same words give the same numbers.

    Raises:
        ValueError: the variance is not above 0 and below `LARGEST_VARIANCE`.
    """

    variance: Fraction
    words: RandomBits

    def __post_init__(self) -> None:
        proposal_for(self.variance)

    def draw(self, count: int) -> Numbers:
        """So many numbers; in how many calls they are drawn makes no difference to them."""
        table = proposal_for(self.variance)
        drawn = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            numbers = _tried(table, self.words, min(BATCH, count - done))
            drawn[done : done + len(numbers)] = numbers
            done += len(numbers)
        return drawn


def _tried(table: Proposal, source: RandomBits, count: int) -> Numbers:
    """The numbers that so many words give, and the words after them if the last need more.

    Words are read in order: one proposes, and where it doesn't tell whether its number is accepted, those
    after it do. So no more are taken from the source than numbers one by one would take.
    """
    words = source(count)
    numbers = np.empty(count, dtype=np.int64)
    places = propose(table, words, numbers)
    if not places.size:
        return numbers
    after = np.minimum(places + 1, count - 1)
    accepted, still_open = judge(table, numbers[places], words[places], words[after])
    still_open[after == places] = True
    left_out: list[int] = []
    free = 0
    for place, is_accepted, is_open in zip(
        places.tolist(), accepted.tolist(), still_open.tolist(), strict=True
    ):
        if place < free:
            continue  # An earlier number's bits.
        free = place + 2
        if is_open:
            following = Following(words, place + 1, source)
            numbers[place], is_accepted = settle(table, int(words[place]), int(numbers[place]), following)
            free = following.place
        left_out.extend(range(place + is_accepted, free))
    stays = np.ones(max(count, free), dtype=np.bool_)
    stays[left_out] = False
    return numbers[stays[:count]]


class Following:
    """Words one after the other: those at hand, then fresh ones."""

    def __init__(self, words: Words, place: int, source: RandomBits) -> None:
        self.words = words
        self.place = place
        self.source = source

    def __call__(self) -> int:
        word = self.words[self.place] if self.place < len(self.words) else self.source(1)[0]
        self.place += 1
        return int(word)


def settle(table: Proposal, word: int, number: int, following: Callable[[], int]) -> tuple[int, bool]:
    """The third stage: a number that a word proposed, or what lies beyond, and whether it is accepted."""
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
    """A number proposed from the blocks beyond the last cell, and what f is to be multiplied by there."""
    block = 0
    while (word := following()) == 0:
        block += WORD
    block += WORD - word.bit_length()
    offset = following() >> WORD - table.block_bits
    factor = Fraction(table.scale << table.block_bits + block + 1, table.slots[-1] << table.width_bits)
    return table.end + (block << table.block_bits) + offset, factor
