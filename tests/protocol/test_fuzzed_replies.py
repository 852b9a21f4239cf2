"""Whatever comes in a message's place ends in one client set aside with a reason, or in a valid update.

Here with a hundred cases a test; `make fuzz-structured` plays a million by the same strategies, `make fuzz` a
million that atheris makes up (`tests/protocol/fuzzing.py`).
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from atoll.kit.roster import FederationRoster
from atoll.kit.signed_replies import Exchange, ReplySigner, SignatureCheck
from atoll.protocol.flower_content import add_seal, bodies_of, packed, packed_greetings
from atoll.protocol.messages import Failure, Hello, Seal, Update, encode_reply, hello_to_json
from atoll.protocol.tensors import to_bytes
from atoll.server.received import Replies, greetings
from atoll.server.rounds.validation import validate_updates
from tests.server.rounds.test_received import setting

NAME, EXAMPLES, ROUND = "client-0000", 12, 1
EXCHANGE = Exchange("run", ROUND, "nonce")
MODEL = {"w": torch.zeros(3), "b": torch.zeros(2, 2)}
UPDATE = Update(
    NAME, ROUND, {"w": torch.ones(3), "b": torch.ones(2, 2)}, EXAMPLES,
    {"train_loss.sum": torch.tensor(3.0), "train_loss.count": torch.tensor(12)}, run=EXCHANGE.run,
)  # fmt: skip
HELLO = Hello(NAME, {"classes": [str(digit) for digit in range(10)]}, EXAMPLES)
MOST_TIMES, MOST_BYTES = 40, 2**17
"""What may be allocated: so many times the message, or so much where it is small."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SCALARS = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=40)
LISTS = st.lists(st.text(max_size=9), min_size=1, max_size=4) | st.lists(st.binary(), min_size=1, max_size=4)


@cache
def keys() -> tuple[ReplySigner, FederationRoster]:
    key = ec.generate_private_key(ec.SECP256R1())
    return ReplySigner(key), FederationRoster({NAME: NAME}, {NAME: key.public_key()})


def texts_of(valid: dict[str, Any]) -> st.SearchStrategy[str]:
    """JSON near the valid one: fields of other values, left out or added; its text cut; any text."""
    whole = json.dumps(valid)
    fields = st.dictionaries(st.sampled_from([*valid, "more"]), JSON, max_size=3)
    left_out = st.sets(st.sampled_from(sorted(valid)), max_size=2)
    near = st.builds(
        lambda changed, gone: json.dumps({k: v for k, v in (valid | changed).items() if k not in gone}),
        fields,
        left_out,
    )
    cut = st.integers(0, len(whole)).map(lambda place: whole[:place])
    deep = st.integers(1, 100_000).map(lambda depth: "[" * depth)
    return st.just(whole) | near | cut | deep | st.text() | JSON.map(json.dumps)


@st.composite
def bodies_near(draw: st.DrawFn, valid: bytes) -> bytes:
    """Safetensors near the valid ones: bytes changed, cut or added; another header; any bytes."""
    way = draw(st.sampled_from(("valid", "bytes", "cut", "more", "header", "any")))
    if way == "bytes":
        spoilt = bytearray(valid)
        for place in draw(st.lists(st.integers(0, len(valid) - 1), min_size=1, max_size=4)):
            spoilt[place] = draw(st.integers(0, 255))
        return bytes(spoilt)
    if way == "header":
        entry = st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "C64", "x"]),
                "shape": st.lists(st.integers(0, 2**40), max_size=3),
                "data_offsets": st.lists(st.integers(0, 2**40), min_size=2, max_size=2),
            }
        )
        names = st.sampled_from(["delta/w", "delta/b", "states/train_loss.sum", "w"]) | st.text(max_size=5)
        header = json.dumps(draw(st.dictionaries(names, entry | JSON, max_size=4))).encode()
        return len(header).to_bytes(8, "little") + header + draw(st.binary(max_size=64))
    found = {
        "valid": valid,
        "cut": valid[: draw(st.integers(0, len(valid)))],
        "more": valid + draw(st.binary(max_size=20)),
        "any": draw(st.binary(max_size=200)),
    }
    return found[way]


HEAD, BODY = encode_reply(UPDATE)
HEADS, BODIES = texts_of(json.loads(HEAD)), bodies_near(BODY)


def records() -> st.SearchStrategy[RecordDict]:
    """Messages whose very records are others than ours."""
    keys = st.sampled_from([f"text/{NAME}", f"body/{NAME}", "json", "seal/run", "seal/clients", "seal/round"])
    held = st.dictionaries(keys | st.text(max_size=9), SCALARS | LISTS, max_size=5).map(ConfigRecord)
    record = held | st.builds(ArrayRecord)
    names = st.sampled_from(["head", "bodies", "hellos"]) | st.text(max_size=5)
    return st.dictionaries(names, record, max_size=3).map(RecordDict)


def check() -> SignatureCheck:
    return SignatureCheck(keys()[1], NAME, EXCHANGE)


def taken(content: RecordDict, *, signed: bool) -> bool:
    """Whether the update in a message is taken; else its client is set aside with a reason."""
    replies = list(Replies(content, [NAME], {NAME: EXAMPLES}, check=check() if signed else None))
    assert [reply.client for reply in replies] == [NAME]
    assert all(reply.reason for reply in replies if isinstance(reply, Failure))
    found = validate_updates(replies, [NAME], MODEL, ROUND, {})
    assert (len(found.updates) == 1) != bool(found.set_aside)
    assert all(0 < len(reason) < 2_000 for reason in found.set_aside.values())
    return bool(found.updates)


def test_the_valid_ones_are_taken() -> None:
    content = packed({NAME: HEAD}, bodies_of({NAME: BODY}))
    assert taken(content, signed=False) and not taken(content, signed=True)
    add_seal(content, keys()[0].seal(EXCHANGE, {NAME: (HEAD, BODY)}))
    assert taken(content, signed=True)
    assert not taken(packed({NAME: HEAD}, bodies_of({NAME: to_bytes({})})), signed=False)


@given(HEADS, BODIES)
def test_any_head_and_body_is_an_update_or_sets_its_client_aside(head: str, body: bytes) -> None:
    content = packed({NAME: head}, bodies_of({NAME: body}))
    tracemalloc.start()
    try:
        taken(content, signed=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= max(MOST_BYTES, MOST_TIMES * (len(head) + len(body)))


@given(records())
def test_any_records_set_the_client_aside_or_leave_the_site_out(content: RecordDict) -> None:
    assert not taken(content, signed=True)
    for signed in (check(), None):
        (hello,) = greetings(content, NAME, setting(1), signed)
        assert hello.refusal


@given(HEADS, BODIES, st.data())
def test_what_its_site_has_not_signed_is_never_taken(head: str, body: bytes, data: st.DataObject) -> None:
    seal = keys()[0].seal(EXCHANGE, {NAME: (HEAD, BODY)})
    changed: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "run": st.text(max_size=5),
                "round": st.integers(-5, 5),
                "nonce": st.text(max_size=5),
                "signatures": st.dictionaries(st.sampled_from([NAME, "x"]), st.binary(max_size=100)),
            },
        )
    )
    told: Seal = replace(seal, **changed)
    content = packed({NAME: head}, bodies_of({NAME: body}))
    add_seal(content, told)
    as_signed = (head, body) == (HEAD, BODY) and told == seal
    assert taken(content, signed=True) == as_signed


@given(texts_of(json.loads(hello_to_json(HELLO))))
def test_any_greeting_introduces_its_client_or_leaves_it_out(text: str) -> None:
    (hello,) = greetings(packed_greetings([text]), NAME, setting(1))
    assert hello.refusal or 0 <= hello.num_examples <= 10**9
    assert len(hello.refusal) < 2_000 and len(hello.client) <= 128
