"""A server that lies in a secure sum: it invents clients, swaps keys, tells sites different stories.

Whatever it does it must never hold what opens one client's vector: as many shares of a seed and of the mask
key of the same client as the threshold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from atoll.errors import ConfigError
from atoll.kit.kit import SiteKit
from atoll.kit.roster import FederationRoster, SiteIdentity
from atoll.privacy.secagg import (
    KEY_BYTES,
    OF_KEY,
    OF_SEED,
    Participant,
    SecureAggregationFailed,
    unmask_sum,
)
from tests.federation.places import provisioned

CONTEXT = b"run 1, round 1"
NAMES = ("a", "b", "c", "d", "e", "f")
THRESHOLD = 5
VECTOR = np.arange(4, dtype=np.uint64)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kits of six sites, and of one with two clients."""
    folder = tmp_path_factory.mktemp("kits")
    return provisioned(folder, (*NAMES, "pair"), 9092, {"pair": ["g", "h"]})


@pytest.fixture
def people(kits: dict[str, Path]) -> dict[str, Participant]:
    identities = {name: SiteIdentity.load(kits[name]) for name in NAMES}
    return {name: Participant(name, CONTEXT, identities[name], len(NAMES)) for name in NAMES}


def advertised(people: Mapping[str, Participant]) -> dict[str, bytes]:
    return {name: person.advertise() for name, person in people.items()}


def masked(people: Mapping[str, Participant]) -> dict[str, bytes]:
    """The protocol up to the masked vectors; returns all keys."""
    keys = advertised(people)
    dealt = {name: person.deal(keys, THRESHOLD) for name, person in people.items()}
    for name, person in people.items():
        person.masked({other: dealt[other][name] for other in people if other != name}, VECTOR)
    return keys


def lists_of(kinds: Sequence[tuple[str, ...]]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Every way to tell each client one of these lists."""
    for told in itertools.product(kinds, repeat=len(NAMES)):
        yield dict(zip(NAMES, told, strict=True))


def test_an_honest_server_gets_the_sum(people: dict[str, Participant]) -> None:
    keys = advertised(people)
    dealt = {name: person.deal(keys, THRESHOLD) for name, person in people.items()}
    vectors = {
        name: person.masked({other: dealt[other][name] for other in NAMES if other != name}, VECTOR)
        for name, person in people.items()
        if name != "c"
    }
    arrived = sorted(vectors)
    signatures = {name: people[name].confirm(arrived) for name in arrived}
    revealed = {name: people[name].reveal(arrived, signatures) for name in arrived}
    total = unmask_sum(keys, list(NAMES), vectors, revealed, THRESHOLD, CONTEXT)
    assert np.array_equal(total, 5 * VECTOR)


def test_a_client_that_the_server_invents_is_believed_by_nobody(people: dict[str, Participant]) -> None:
    keys = advertised(people)
    made_up = Participant("z", CONTEXT).advertise()
    borrowed = made_up + keys["a"][KEY_BYTES:]
    known_name = {n: keys[n] for n in NAMES if n != "f"} | {"f": made_up + keys["f"][KEY_BYTES:]}
    for told in (keys | {"z": made_up}, keys | {"z": borrowed}, keys | {"g": borrowed}, known_name):
        for person in people.values():
            if told.get(person.name) == keys[person.name]:
                with pytest.raises(SecureAggregationFailed, match="not signed by its site"):
                    person.deal(told, THRESHOLD)


@pytest.mark.parametrize("part", [0, 40, 70, 100])
def test_keys_that_are_changed_on_their_way_are_believed_by_nobody(
    people: dict[str, Participant], part: int
) -> None:
    keys = advertised(people)
    spoilt = bytearray(keys["b"])
    spoilt[part] ^= 1
    with pytest.raises(SecureAggregationFailed, match="keys of b are not signed"):
        people["a"].deal(keys | {"b": bytes(spoilt)}, THRESHOLD)


def test_keys_of_another_round_or_client_are_believed_by_nobody(
    kits: dict[str, Path], people: dict[str, Participant]
) -> None:
    keys = advertised(people)
    earlier = Participant("b", b"run 1, round 0", SiteIdentity.load(kits["b"])).advertise()
    for told in (keys | {"b": earlier}, keys | {"b": keys["c"], "c": keys["b"]}):
        with pytest.raises(SecureAggregationFailed, match="keys of b are not signed"):
            people["a"].deal(told, THRESHOLD)


def test_fewer_clients_than_the_job_has_open_nothing(people: dict[str, Participant]) -> None:
    """Of six clients the server shows three to each other: their sum would tell more of each."""
    keys = advertised(people)
    few = {name: keys[name] for name in ("a", "b", "c")}
    with pytest.raises(SecureAggregationFailed, match="a cohort of 6 needs 5"):
        people["a"].deal(few, 3)


def test_a_site_signs_for_its_own_clients_alone(kits: dict[str, Path]) -> None:
    pair, a = SiteIdentity.load(kits["pair"]), SiteIdentity.load(kits["a"])
    assert pair is not None and a is not None
    signed = pair.sign(b"words")
    assert len(signed) == 96
    assert [a.has_signed(client, b"words", signed) for client in ("g", "h", "pair", "a", "z")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert not a.has_signed("g", b"other words", signed)
    assert not a.has_signed("g", b"words", signed[:-1]) and not a.has_signed("g", b"words", bytes(96))
    assert a.knows("g") and not a.knows("pair")


def test_no_two_stories_open_a_vector(kits: dict[str, Path]) -> None:
    """The victim's vector is called arrived before some and lost before others, in every way there is."""
    whole, without = tuple(NAMES), tuple(n for n in NAMES if n != "a")
    identities = {name: SiteIdentity.load(kits[name]) for name in NAMES}
    for told in itertools.islice(lists_of((whole, without)), 1, None, 7):
        people = {name: Participant(name, CONTEXT, identities[name], len(NAMES)) for name in NAMES}
        masked(people)
        signatures: dict[tuple[str, ...], dict[str, bytes]] = {whole: {}, without: {}}
        for name, names in told.items():
            if name in names:
                signatures[names][name] = people[name].confirm(names)
        shares = {OF_SEED: 0, OF_KEY: 0}
        for name, story in itertools.product(NAMES, (whole, without)):
            if name in story:
                with contextlib.suppress(SecureAggregationFailed):
                    shares[people[name].reveal(story, signatures[story])["a"][:1]] += 1
        assert min(shares.values()) == 0, told


def test_shares_are_revealed_to_who_shows_enough_signatures_of_the_same_list(
    people: dict[str, Participant],
) -> None:
    masked(people)
    whole, without = list(NAMES), list(NAMES[:5])
    signed = {name: people[name].confirm(whole) for name in NAMES}
    others = {name: people[name]._signed(people[name]._list_said(tuple(without))) for name in without}
    four = {name: signed[name] for name in NAMES[:4]}
    for signatures in ({}, four, others, four | {"e": signed["a"], "f": bytes(96)}):
        with pytest.raises(SecureAggregationFailed, match="signed the list of vectors"):
            people["a"].reveal(whole, signatures)
    with pytest.raises(SecureAggregationFailed, match="other clients than those named before"):
        people["a"].reveal(without, others)
    assert len(people["a"].reveal(whole, four | {"e": signed["e"]})) == 6


def test_a_dealer_whose_shares_do_not_give_its_seed_is_named(people: dict[str, Participant]) -> None:
    keys = advertised(people)
    people["b"]._seed = bytes(32)  # after it has committed itself to another one
    dealt = {name: person.deal(keys, THRESHOLD) for name, person in people.items()}
    vectors = {
        name: person.masked({o: dealt[o][name] for o in NAMES if o != name}, VECTOR)
        for name, person in people.items()
    }
    signatures = {name: person.confirm(NAMES) for name, person in people.items()}
    revealed = {name: person.reveal(NAMES, signatures) for name, person in people.items()}
    with pytest.raises(SecureAggregationFailed, match="the shares of b do not give its seed"):
        unmask_sum(keys, list(NAMES), vectors, revealed, THRESHOLD, CONTEXT)


def test_a_roster_that_the_authority_has_not_signed_is_refused(kits: dict[str, Path], tmp_path: Path) -> None:
    table, signature = kits["a"] / "roster.toml", kits["a"] / "roster.sig"
    before, signed = table.read_text(), signature.read_bytes()
    other = provisioned(tmp_path, ("a", "b"), 9092)["a"]
    try:
        for text, seal in (
            (before.replace('"h"', '"i"'), signed),
            (before, b""),
            ((other / "roster.toml").read_text(), (other / "roster.sig").read_bytes()),
        ):
            table.write_text(text), signature.write_bytes(seal)
            with pytest.raises(ConfigError, match=r"roster\.toml: is not what the federation's authority"):
                SiteIdentity.load(kits["a"])
        table.unlink()
        assert SiteIdentity.load(kits["a"]) is None and SiteKit.load(kits["a"]).name == "a"
    finally:
        table.write_text(before), signature.write_bytes(signed)
    roster = FederationRoster.load(kits["server"])
    assert roster is not None and roster.sites["h"] == "pair" and roster.sites["a"] == "a"
