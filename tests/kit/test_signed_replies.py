"""What leaves a site is signed by its key for one request; nothing else is accepted, and all of that is."""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

import atoll.kit.signed_replies as signed_replies
from atoll.errors import DataError
from atoll.kit.roster import FederationRoster, SiteIdentity
from atoll.kit.signed_replies import (
    PURPOSE,
    Exchange,
    ReplySigner,
    SignatureCheck,
    signed_content,
)
from atoll.protocol.flower_content import add_seal, bodies_of, packed, seal_of, unpacked
from atoll.protocol.messages import Seal, content_sha256
from tests.federation.places import provisioned

FORGERIES, HONEST = 10_000, 200
SITES = {"a": "north", "b": "north", "c": "south", "d": "east"}


@dataclass(frozen=True)
class Sent:
    """One client's message as it reaches the server, from the site that brought it."""

    site: str
    client: str
    head: str
    body: bytes
    seal: Seal | None


@dataclass
class Forger:
    """Sites with their keys, and whoever makes other messages of theirs; P-256, which is fast to check."""

    draw: random.Random

    def __post_init__(self) -> None:
        names = sorted(set(SITES.values()))
        keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in [*names, "stranger"]}
        self.signers = {name: ReplySigner(key) for name, key in keys.items()}
        public = {client: keys[site].public_key() for client, site in SITES.items()}
        self.roster = FederationRoster(SITES, public)

    def text(self, size: int = 12) -> str:
        return "".join(self.draw.choices(string.ascii_letters + string.digits, k=size))

    def exchange(self) -> Exchange:
        return Exchange.new(self.text(), self.draw.randint(0, 1000))

    def honest(self, exchange: Exchange, client: str) -> Sent:
        head, body = f'{{"client": "{client}", "x": "{self.text()}"}}', self.draw.randbytes(40)
        return self.sign(Sent(SITES[client], client, head, body, None), exchange, SITES[client])

    def sign(self, sent: Sent, exchange: Exchange, by: str) -> Sent:
        contents = {sent.client: (sent.head, sent.body)}
        return replace(sent, seal=self.signers[by].seal(exchange, contents))

    def other(self, among: Sequence[str], than: str) -> str:
        return self.draw.choice([one for one in among if one != than])

    def flipped(self, content: bytes) -> bytes:
        spoilt = bytearray(content)
        spoilt[self.draw.randrange(len(spoilt))] ^= 1 << self.draw.randrange(8)
        return bytes(spoilt)

    def fault(self, sent: Sent, exchange: Exchange) -> str:
        return fault_of(SignatureCheck(self.roster, sent.site, exchange), sent)


def fault_of(check: SignatureCheck, sent: Sent) -> str:
    """As a server finds it."""
    try:
        return check.fault(sent.seal, sent.client, content_sha256(sent.head, sent.body))
    except DataError as error:
        return str(error)


Forge = Callable[[Forger, Sent, Exchange], Sent]


def with_signature(sent: Sent, signature: bytes, client: str = "") -> Sent:
    assert sent.seal is not None
    return replace(sent, seal=replace(sent.seal, signatures={client or sent.client: signature}))


def signature(sent: Sent) -> bytes:
    assert sent.seal is not None
    return sent.seal.signatures[sent.client]


def readdressed(sent: Sent, exchange: Exchange) -> Sent:
    """The message as if it answered that request: of its seal nothing but the signature stays."""
    assert sent.seal is not None
    return replace(sent, seal=Seal(exchange.run, exchange.round, exchange.nonce, sent.seal.signatures))


def of_another(field: str) -> Forge:
    """What its site has signed for a request that differs in one field, given out for this one's."""

    def forge(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
        other = replace(exchange, **{field: getattr(forger.exchange(), field)})
        if other == exchange:
            other = replace(exchange, round=exchange.round + 1)
        return readdressed(forger.sign(sent, other, sent.site), exchange)

    return forge


def sent_again(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """What its site has sent as the answer to another request, as it was."""
    field = forger.draw.choice(("run", "round", "nonce"))
    before = {"run": forger.text(), "round": exchange.round + 1, "nonce": forger.text(32)}[field]
    return forger.sign(sent, replace(exchange, **{field: before}), sent.site)


def claims_changed(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    assert sent.seal is not None
    changed: dict[str, Any] = {
        "run": forger.flipped(exchange.run.encode()).decode(errors="replace"),
        "round": exchange.round + forger.draw.choice((-1, 1)),
        "nonce": forger.flipped(exchange.nonce.encode()).decode(errors="replace"),
    }
    field = forger.draw.choice(sorted(changed))
    return replace(sent, seal=replace(sent.seal, **{field: changed[field]}))


def of_its_sites_other_client(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """A site's own answer for one of its clients, given out for another one of its clients."""
    one = forger.honest(exchange, "a")
    return with_signature(replace(one, client="b"), signature(one), "b")


def of_another_site(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """A site speaks for another's client: by its own key, or with what that one has signed."""
    site = forger.other(sorted(set(SITES.values())), sent.site)
    by = forger.draw.choice((site, sent.site))
    return replace(forger.sign(sent, exchange, by), site=site)


def through_another_site(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """The right site's name, and another site's signature."""
    return forger.sign(sent, exchange, forger.other(sorted(set(SITES.values())), sent.site))


def swapped(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    other = forger.honest(exchange, sent.client)
    return replace(sent, **forger.draw.choice(({"body": other.body}, {"head": other.head})))


def moved(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """Head and body cut at another place."""
    sent = forger.sign(replace(sent, body=b"one\0two"), exchange, sent.site)
    return replace(sent, head=f"{sent.head}\0one", body=b"two")


def cut(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    part = forger.draw.choice(("head", "body", "signature"))
    if part == "signature":
        whole = signature(sent)
        return with_signature(sent, whole[: forger.draw.randrange(len(whole))])
    whole = getattr(sent, part)
    return replace(sent, **{part: whole[: forger.draw.randrange(len(whole))]})


def flipped_anywhere(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    place = forger.draw.choice(("head", "body", "signature", "client"))
    if place == "signature":
        return with_signature(sent, forger.flipped(signature(sent)))
    if place == "body":
        return replace(sent, body=forger.flipped(sent.body))
    if place == "head":
        return replace(sent, head=forger.flipped(sent.head.encode()).decode(errors="replace"))
    name = forger.flipped(sent.client.encode()).decode(errors="replace")
    return with_signature(replace(sent, client=name), signature(sent), name)


def for_another_purpose(forger: Forger, sent: Sent, exchange: Exchange) -> Sent:
    """The same fields, signed by the site for something else."""
    content = signed_content(exchange, sent.client, content_sha256(sent.head, sent.body))
    key = forger.signers[sent.site].key
    roster = SiteIdentity(key, forger.roster)
    return with_signature(sent, roster.sign(content.removeprefix(len(PURPOSE).to_bytes(8, "big") + PURPOSE)))


WAYS: dict[str, Forge] = {
    "a stranger's key": lambda forger, sent, exchange: forger.sign(sent, exchange, "stranger"),
    "another site's key": through_another_site,
    "another site's client": of_another_site,
    "another client of the site": of_its_sites_other_client,
    "another run": of_another("run"),
    "another round": of_another("round"),
    "another request": of_another("nonce"),
    "sent again": sent_again,
    "claims changed": claims_changed,
    "parts swapped": swapped,
    "parts moved": moved,
    "cut": cut,
    "a bit flipped": flipped_anywhere,
    "another purpose": for_another_purpose,
    "no signature": lambda forger, sent, exchange: replace(sent, seal=None),
    "a signature for another": lambda forger, sent, exchange: with_signature(sent, signature(sent), "x"),
}


def accepted(number: int, seed: int) -> Counter[str]:
    """How many of so many forgeries of each kind are accepted; that all honest ones are, is asserted."""
    forger, found = Forger(random.Random(seed)), Counter[str]()
    honest = []
    for _ in range(HONEST):
        exchange = forger.exchange()
        honest.append((forger.honest(exchange, forger.draw.choice(sorted(SITES))), exchange))
        assert forger.fault(*honest[-1]) == ""
    for _ in range(number):
        sent, exchange = forger.draw.choice(honest)
        way = forger.draw.choice(sorted(WAYS))
        fault = forger.fault(WAYS[way](forger, sent, exchange), exchange)
        assert len(fault) < 200
        found[way] += fault == ""
    return +found


def test_of_ten_thousand_forgeries_none_is_accepted() -> None:
    assert not accepted(FORGERIES, seed=1)


SIGNED = ("purpose", "run", "round", "client", "nonce", "content")


@pytest.mark.parametrize("left_out", SIGNED)
def test_without_any_one_of_the_fields_that_are_signed_forgeries_are_accepted(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would fail."""

    def without(exchange: Exchange, client: str, digest: bytes) -> bytes:
        exchange = replace(
            exchange,
            run="" if left_out == "run" else exchange.run,
            round=0 if left_out == "round" else exchange.round,
            nonce="" if left_out == "nonce" else exchange.nonce,
        )
        client, digest = "" if left_out == "client" else client, b"" if left_out == "content" else digest
        whole = signed_content(exchange, client, digest)
        mark = len(PURPOSE).to_bytes(8, "big") + PURPOSE
        return whole.removeprefix(mark) if left_out == "purpose" else whole

    monkeypatch.setattr(signed_replies, "signed_content", without)
    expected = {
        "purpose": "another purpose", "run": "another run", "round": "another round",
        "nonce": "another request", "client": "another client of the site", "content": "parts swapped",
    }  # fmt: skip
    assert expected[left_out] in accepted(400, seed=2)


def test_an_answer_counts_once_and_one_that_was_refused_does_not_stand_in_its_way() -> None:
    forger = Forger(random.Random(3))
    exchange = forger.exchange()
    sent, check = forger.honest(exchange, "a"), SignatureCheck(forger.roster, "north", exchange)
    bad = replace(sent, body=b"other")
    assert "signed" in fault_of(check, bad)
    assert fault_of(check, sent) == ""
    assert "twice" in fault_of(check, sent)
    assert fault_of(check, forger.honest(exchange, "b")) == ""


def test_a_client_that_no_roster_names_is_its_own_sites() -> None:
    forger = Forger(random.Random(4))
    exchange = forger.exchange()
    sent = Sent("north", "ward", "{}", b"", None)
    own, others = forger.sign(sent, exchange, "north"), forger.sign(sent, exchange, "south")
    assert forger.fault(own, exchange) == ""
    assert forger.fault(others, exchange) == "its message is not what its site has signed"
    unknown = replace(own, site="west")
    assert forger.fault(unknown, exchange) == "site west is not in the federation's roster"


def test_the_keys_of_a_kit_sign_and_the_servers_kit_checks(tmp_path: Path) -> None:
    kits = provisioned(tmp_path, ("north", "south"), port=9092)
    roster = FederationRoster.load(kits["server"])
    assert roster is not None
    exchange, contents = Exchange.new("run", 1), {"north": ("{}", b"body")}
    own, other = (ReplySigner.load(kits[name]).seal(exchange, contents) for name in ("north", "south"))
    check = SignatureCheck(roster, "north", exchange)
    sent = content_sha256("{}", b"body")
    assert check.fault(other, "north", sent) == "its message is not what its site has signed"
    assert check.fault(own, "north", sent) == ""


def test_a_seal_travels_with_its_message_and_is_no_part_of_its_content() -> None:
    seal = Seal("run", 3, "nonce", {"a": b"1" * 96, "b": b"2" * 96})
    for size in (1, 2**17):
        content = packed({"a": "head"}, bodies_of({"a": bytes(size)}))
        add_seal(content, seal)
        assert seal_of(content) == seal
        assert unpacked(content) == ({"a": "head"}, {"a": bytes(size)})


@pytest.mark.parametrize(
    "fields",
    [
        {"seal/run": 1},
        {"seal/round": 1.0},
        {"seal/round": True},
        {"seal/nonce": b"n"},
        {"seal/clients": ["a", "a"]},
        {"seal/clients": ["a"]},
        {"seal/clients": "ab"},
        {"seal/signatures": ["1", "2"]},
        {"seal/signatures": b"12"},
        {"seal/clients": [1, 2]},
    ],
)
def test_a_seal_of_another_form_is_refused(fields: dict[str, Any]) -> None:
    content = packed({}, bodies_of({}))
    add_seal(content, Seal("run", 3, "nonce", {"a": b"1", "b": b"2"}))
    for name, value in fields.items():
        content.config_records["head"][name] = value
    with pytest.raises(DataError, match="message whose seal"):
        seal_of(content)


def test_what_has_no_record_of_texts_has_no_seal() -> None:
    assert seal_of(RecordDict()) is None
    assert seal_of(RecordDict({"head": ArrayRecord()})) is None
    assert seal_of(RecordDict({"head": ConfigRecord(), "hellos": ConfigRecord()})) is None
