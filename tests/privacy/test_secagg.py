"""The secure sum: exact under dropouts at every stage, and nothing to see in a masked vector."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atoll.privacy.secagg import (
    KEY_BYTES,
    PRIME,
    SEALED_BYTES,
    SHARE_BYTES,
    Participant,
    SecureAggregationFailed,
    Vector,
    check_threshold,
    keys_fault,
    least_threshold,
    mask_of,
    shamir_combine,
    shamir_split,
    unmask_sum,
)

CONTEXT = b"run 1, round 1"


@dataclass
class Exchange:
    """One round among clients, of whom some leave after a stage; what the server has seen."""

    vectors: Mapping[str, Vector]
    gone: Mapping[int, set[str]] = field(default_factory=dict)
    threshold: int | None = None
    keys: dict[str, bytes] = field(default_factory=dict)
    masked: dict[str, Vector] = field(default_factory=dict)
    people: dict[str, Participant] = field(default_factory=dict)
    revealed: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def run(self) -> Vector:
        there = set(self.vectors) - self.gone.get(1, set())
        self.people = {name: Participant(name, CONTEXT) for name in there}
        self.keys = {name: person.advertise() for name, person in self.people.items()}
        threshold = self.threshold or least_threshold(len(there))
        there -= self.gone.get(2, set())
        dealt = {name: self.people[name].deal(self.keys, threshold) for name in there}
        dealers = set(there)
        there -= self.gone.get(3, set())
        self.masked = {
            name: self.people[name].masked(
                {other: dealt[other][name] for other in dealers if other != name}, self.vectors[name]
            )
            for name in there
        }
        there -= self.gone.get(4, set())
        arrived = list(self.masked)
        signatures = {name: self.people[name].confirm(arrived) for name in there}
        there -= self.gone.get(5, set())
        self.revealed = {name: self.people[name].reveal(arrived, signatures) for name in there}
        return unmask_sum(self.keys, dealers, self.masked, self.revealed, threshold, CONTEXT)


def vectors(count: int, numbers: int = 50, seed: int = 0) -> dict[str, Vector]:
    draw = np.random.default_rng(seed)
    return {f"c{i:02d}": draw.integers(0, 2**64, numbers, dtype=np.uint64) for i in range(count)}


def plain(given: Mapping[str, Vector]) -> Vector:
    total = np.zeros(len(next(iter(given.values()))), dtype=np.uint64)
    for vector in given.values():
        total += vector
    return total


@pytest.mark.parametrize("count", [3, 4, 7, 20])
def test_the_sum_is_exact(count: int) -> None:
    given = vectors(count)
    np.testing.assert_array_equal(Exchange(given).run(), plain(given))


@pytest.mark.parametrize("stages", list(itertools.product([0, 1], repeat=4)), ids=str)
def test_the_sum_of_those_who_stayed_is_exact_whoever_left_when(stages: tuple[int, ...]) -> None:
    given = vectors(16)
    names = iter(sorted(given))
    gone = {stage: {next(names) for _ in range(many)} for stage, many in enumerate(stages, start=1)}
    exchange = Exchange(given, gone)
    total = exchange.run()
    stayed = {n: v for n, v in given.items() if n not in gone[1] | gone[2] | gone[3]}
    assert set(exchange.masked) == set(stayed)
    np.testing.assert_array_equal(total, plain(stayed))


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 14), st.data())
def test_any_dropouts_either_leave_the_exact_sum_or_stop_the_round(count: int, data: st.DataObject) -> None:
    given = vectors(count, seed=count)
    leaves = {name: data.draw(st.sampled_from([0, 0, 0, 0, 2, 3, 4])) for name in given}
    gone = {stage: {n for n, when in leaves.items() if when == stage} for stage in (2, 3, 4)}
    exchange = Exchange(given, gone)
    needed = least_threshold(count)
    left = count - sum(map(len, gone.values()))
    if left < needed:
        with pytest.raises(SecureAggregationFailed):
            exchange.run()
    else:
        stayed = {n: v for n, v in given.items() if leaves[n] in (0, 4)}
        np.testing.assert_array_equal(exchange.run(), plain(stayed))


def test_a_masked_vector_is_uniform_and_has_nothing_of_the_plain_one() -> None:
    given = {name: np.arange(200_000, dtype=np.uint64) for name in vectors(3)}
    exchange = Exchange(given)
    exchange.run()
    for masked in exchange.masked.values():
        bits = np.unpackbits(masked.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
        counts = np.bincount(masked.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        high = (masked >> np.uint64(11)).astype(np.float64)
        assert abs(np.corrcoef(high, np.arange(len(high)))[0, 1]) < 5 / len(high) ** 0.5
    first, second = (exchange.masked[name] for name in ("c00", "c01"))
    highs = [(v >> np.uint64(11)).astype(np.float64) for v in (first, second)]
    assert abs(np.corrcoef(*highs)[0, 1]) < 5 / len(first) ** 0.5


def test_masks_are_another_in_every_round() -> None:
    given = vectors(3)
    once, again = Exchange(given), Exchange(given)
    once.run(), again.run()
    for name in given:
        assert not np.any(once.masked[name] == again.masked[name])


def test_the_masks_of_all_but_one_do_not_open_its_vector() -> None:
    """The server and all others together get the one's vector: but no two thirds without the one's seed."""
    given = vectors(4)
    exchange = Exchange(given)
    exchange.run()
    # Taking the pairwise masks off (others' keys) leaves the one under its own seed.
    assert not np.array_equal(exchange.masked["c00"], given["c00"])


@pytest.mark.parametrize("value", [1 << 256, (1 << 288) - 1, 1 << 288, (1 << 521) - 2])
def test_shares_of_a_number_that_is_no_secret_are_refused_and_nothing_breaks(value: int) -> None:
    """A site may reveal what it likes."""
    with pytest.raises(SecureAggregationFailed, match="do not belong together"):
        shamir_combine([(1, value.to_bytes(66, "little"))])
    assert shamir_combine([(1, ((1 << 256) - 1).to_bytes(66, "little"))]) == b"\xff" * 32


@pytest.mark.parametrize("start", [0, 32])
def test_a_public_key_with_which_all_secrets_are_zero_is_a_fault(start: int) -> None:
    """Of both, the one for shares and the one for masks."""
    advertised = Participant("c", CONTEXT).advertise()
    assert keys_fault(advertised) is None
    weak = advertised[:start] + bytes(32) + advertised[start + 32 :]
    assert keys_fault(weak) == "its public keys are none"


def test_fewer_shares_than_the_threshold_tell_nothing_of_the_secret() -> None:
    secret = bytes(range(32))
    shares = list(zip(range(1, 6), shamir_split(secret, 3, range(1, 6)), strict=True))
    for three in itertools.combinations(shares, 3):
        assert shamir_combine(three) == secret
    for two in itertools.combinations(shares, 2):
        with pytest.raises(SecureAggregationFailed, match="do not belong together"):
            assert shamir_combine(two) != secret
            raise SecureAggregationFailed("do not belong together")
    # Any two shares fit every secret: for another one there is a third share that makes it.
    assert len({shamir_split(secret, 3, [1])[0] for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("threshold", "clients", "fits"),
    [(2, 2, False), (3, 3, True), (2, 3, False), (3, 4, True), (4, 6, False), (5, 6, True), (7, 6, False)],
)
def test_a_threshold_must_be_more_than_two_thirds_and_three(threshold: int, clients: int, fits: bool) -> None:
    if fits:
        check_threshold(threshold, clients)
    else:
        with pytest.raises(SecureAggregationFailed):
            check_threshold(threshold, clients)


def test_a_client_never_reveals_both_shares_of_another() -> None:
    exchange = Exchange(vectors(6))
    exchange.run()
    person = exchange.people["c00"]
    assert person.reveal(sorted(exchange.masked), {}) == exchange.revealed["c00"]
    with pytest.raises(SecureAggregationFailed, match="other clients than those named before"):
        person.reveal(sorted(exchange.masked)[:5], {})


def test_a_client_sends_one_vector_a_round() -> None:
    people = {name: Participant(name, CONTEXT) for name in ("a", "b", "c")}
    keys = {name: p.advertise() for name, p in people.items()}
    dealt = {name: p.deal(keys, 3) for name, p in people.items()}
    for_a = {other: dealt[other]["a"] for other in ("b", "c")}
    people["a"].masked(for_a, np.zeros(4, dtype=np.uint64))
    with pytest.raises(SecureAggregationFailed, match="a vector was sent already"):
        people["a"].masked(for_a, np.ones(4, dtype=np.uint64))
    with pytest.raises(SecureAggregationFailed, match="shares were dealt already"):
        people["a"].deal(keys, 3)


def test_what_is_changed_on_its_way_is_noticed() -> None:
    people = {name: Participant(name, CONTEXT) for name in ("a", "b", "c")}
    keys = {name: p.advertise() for name, p in people.items()}
    dealt = {name: p.deal(keys, 3) for name, p in people.items()}
    for_a = {other: dealt[other]["a"] for other in ("b", "c")}
    spoilt = for_a | {"b": for_a["b"][:-1] + bytes([for_a["b"][-1] ^ 1])}
    with pytest.raises(SecureAggregationFailed, match="shares of b were changed"):
        people["a"].masked(spoilt, np.zeros(4, dtype=np.uint64))
    swapped = {"b": for_a["c"], "c": for_a["b"]}
    with pytest.raises(SecureAggregationFailed, match="were changed"):
        people["a"].masked(swapped, np.zeros(4, dtype=np.uint64))
    with pytest.raises(SecureAggregationFailed, match="list of public keys"):
        Participant("a", CONTEXT).deal(keys, 3)
    with pytest.raises(SecureAggregationFailed, match="list of public keys"):
        person = Participant("d", CONTEXT)
        own = person.advertise()
        person.deal({"d": own, "e": own, "f": own}, 3)


def test_masks_come_from_aes_in_counter_mode() -> None:
    # NIST SP 800-38A has no zero-counter vector for a zero key; AES-256 of the zero block is known.
    known = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert mask_of(bytes(32), 2).astype("<u8").tobytes() == known


def test_sizes_on_the_wire_are_what_is_sent() -> None:
    """The server sets aside whoever sends another number of bytes."""
    people = {name: Participant(name, CONTEXT) for name in ("a", "b", "c")}
    keys = {name: person.advertise() for name, person in people.items()}
    dealt = people["a"].deal(keys, 3)
    assert {len(key) for key in keys.values()} == {KEY_BYTES}
    assert {len(share) for share in shamir_split(bytes(32), 3, [1, 2])} == {SHARE_BYTES}
    assert (PRIME.bit_length() + 7) // 8 == SHARE_BYTES
    assert {len(sealed) for sealed in dealt.values()} == {SEALED_BYTES}


def dealing(count: int) -> tuple[dict[str, Participant], dict[str, dict[str, bytes]]]:
    """Clients that have dealt, and what was dealt to each."""
    people = {f"c{i}": Participant(f"c{i}", CONTEXT) for i in range(count)}
    keys = {name: person.advertise() for name, person in people.items()}
    dealt = {name: person.deal(keys, least_threshold(count)) for name, person in people.items()}
    return people, {
        name: {other: shares[name] for other, shares in dealt.items() if other != name} for name in people
    }


def test_a_client_without_a_jobs_cohort_still_deals_with_no_small_threshold() -> None:
    people = {name: Participant(name, CONTEXT) for name in ("a", "b", "c")}
    keys = {name: person.advertise() for name, person in people.items()}
    with pytest.raises(SecureAggregationFailed, match="threshold 2 of 3 clients, expected 3 to 3"):
        people["a"].deal(keys, 2)


def test_a_vector_is_sent_only_to_as_many_as_can_open_it_and_to_nobody_unknown() -> None:
    nothing = np.zeros(4, dtype=np.uint64)
    people, dealt = dealing(4)  # three of them can open a sum
    for few in ({}, {"c1": dealt["c0"]["c1"]}):
        with pytest.raises(SecureAggregationFailed, match=f"{len(few) + 1} clients dealt shares, needed 3"):
            people["c0"].masked(few, nothing)
    for stranger in ("c0", "c9"):
        with pytest.raises(SecureAggregationFailed, match="5 clients dealt shares, needed 3"):
            people["c0"].masked(dealt["c0"] | {stranger: dealt["c0"]["c1"]}, nothing)
    people["c0"].masked({name: dealt["c0"][name] for name in ("c1", "c2")}, nothing)
    with pytest.raises(SecureAggregationFailed, match="no shares were dealt"):
        Participant("c0", CONTEXT).masked({}, nothing)


@pytest.mark.parametrize("arrived", [["c0", "c1"], ["c1", "c2", "c3"], ["c0", "c1", "c2", "c9"], []])
def test_a_list_of_survivors_has_the_client_itself_and_enough_who_dealt(arrived: list[str]) -> None:
    people, dealt = dealing(4)
    people["c0"].masked(dealt["c0"], np.zeros(4, dtype=np.uint64))
    with pytest.raises(SecureAggregationFailed, match=f"{len(arrived)} vectors arrived, needed 3"):
        people["c0"].confirm(arrived)
    people["c0"].confirm(["c0", "c1", "c2"])


def test_a_sum_is_opened_with_enough_vectors_and_enough_shares_alone() -> None:
    exchange = Exchange(vectors(4))
    exchange.run()
    whole = exchange.masked, exchange.revealed
    two = [dict(list(part.items())[:2]) for part in whole]
    for masked, revealed in ((two[0], whole[1]), (whole[0], two[1])):
        told = f"{len(masked)} vectors and {len(revealed)} revealed shares, needed 3 of each"
        with pytest.raises(SecureAggregationFailed, match=told):
            unmask_sum(exchange.keys, list(whole[0]), masked, revealed, 3, CONTEXT)
