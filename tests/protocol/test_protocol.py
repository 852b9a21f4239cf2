"""Streams, hashes and messages: against definitions written out, and against hostile bytes."""

import dataclasses
import hashlib
import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import DataError
from atoll.protocol.messages import (
    Failure,
    Hello,
    Measurement,
    Update,
    decode_reply,
    encode_reply,
    hello_from_json,
    hello_to_json,
)
from atoll.protocol.random_streams import global_stream, stream, stream_seed
from atoll.protocol.requests import (
    KINDS,
    ConfirmRequest,
    EvaluateRequest,
    KeysRequest,
    MaskedSumRequest,
    Request,
    RequestOrigin,
    RevealRequest,
    SharesRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskedSumRequest,
    decode_request,
    encode_request,
)
from atoll.protocol.tensors import from_bytes, tensors_sha256, to_bytes


def test_a_streams_seed_is_the_hash_of_its_purpose() -> None:
    digest = hashlib.sha256(b'[7,"cohort",1]').digest()
    assert stream_seed(7, "cohort", 1) == int.from_bytes(digest[:8], "little") >> 1


@given(st.lists(st.one_of(st.text(), st.integers())))
def test_a_purpose_is_spelt_as_json(purpose: list[str | int]) -> None:
    text = json.dumps([7, *purpose], separators=(",", ":"))
    expected = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    assert stream_seed(7, *purpose) == expected


def test_streams_do_not_touch_each_other_or_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    a = torch.rand(5, generator=stream(1, "a"))
    assert torch.equal(a, torch.rand(5, generator=stream(1, "a")))
    assert not torch.equal(a, torch.rand(5, generator=stream(1, "b")))
    with global_stream(1, "init"):
        first = torch.rand(3)
    with global_stream(1, "init"):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_purposes_that_spell_alike_stay_apart() -> None:
    assert stream_seed(1, "a", 11) != stream_seed(1, "a", 1, 1) != stream_seed(1, "a1", 1)
    assert stream_seed(1, "a", "1") != stream_seed(1, "a", 1)


def test_the_hash_of_tensors_is_over_name_dtype_shape_and_little_endian_bytes() -> None:
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor([3], dtype=torch.int64)}
    expected = hashlib.sha256(
        b"a\0int64\0"
        + b"1\0"
        + struct.pack("<q", 3)
        + b"b\0float32\0"
        + b"1,2\0"
        + struct.pack("<2f", 1.5, -2.0)
    ).hexdigest()
    assert tensors_sha256(tensors) == expected
    assert tensors_sha256(dict(reversed(tensors.items()))) == expected
    assert tensors_sha256({**tensors, "b": tensors["b"].T}) != expected


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_tensors_survive_the_wire(values: list[float]) -> None:
    sent = {
        "x": torch.tensor(values),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    got = from_bytes(to_bytes(sent))
    assert tensors_sha256(got) == tensors_sha256(sent)


REPLIES = [
    Update("c", 3, {"w": torch.tensor([1.0])}, 5, {"train_loss.sum": torch.tensor(2.0).double()}),
    Measurement("c", 3, 5, {"accuracy.tp": torch.tensor([1, 2])}),
    Failure("c", "disk full"),
]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: type(r).__name__)
def test_a_reply_survives_the_wire(reply: Update | Measurement | Failure) -> None:
    got = decode_reply(*encode_reply(reply))
    assert type(got) is type(reply)
    assert encode_reply(got) == encode_reply(reply)


def test_a_hello_survives_the_wire() -> None:
    hello = Hello("c", {"classes": ["x"]}, 4)
    assert hello_from_json(hello_to_json(hello)) == hello


@pytest.mark.parametrize(
    ("head", "body", "pattern"),
    [
        ("{", b"", "malformed message head"),
        ("[]", b"", "message version: expected 3"),
        ('{"version": 1, "kind": "Update"}', b"", "expected 3, found 1"),  # row 65
        ('{"version": 3, "kind": "Pickle"}', to_bytes({}), "unknown kind"),
        ('{"version": 3, "kind": "Update"}', to_bytes({}), "malformed Update"),
        ('{"version": 3, "kind": "Failure"}', b"\x80\x04cos\nsystem", "not a safetensors message"),  # row 61
        (
            '{"version": 3, "kind": "Failure"}',
            struct.pack("<Q", 2**60),
            "not a safetensors message",
        ),  # row 54
        ('{"version": 3, "kind": "Failure"}', b"", "not a safetensors message"),
    ],
)
def test_a_malformed_message_is_one_typed_error(head: str, body: bytes, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        decode_reply(head, body)


def as_json(**fields: Any) -> str:
    return json.dumps({"version": 3} | fields)


UPDATE = {"kind": "Update", "client": "c", "round": 1, "num_examples": 3, "run": "r"}
TRAIN = {"kind": "TrainRequest", "job": "{}", "job_hash": "h", "round": 1, "data_info": {}, "run": "r"}
KEYS = TRAIN | {"kind": "KeysRequest", "attempt": 1, "threshold": 3}


@pytest.mark.parametrize(
    ("head", "pattern"),
    [
        (UPDATE | {"client": 5}, "malformed Update: client: .*string"),
        (UPDATE | {"client": None}, "malformed Update: client: .*string"),
        (UPDATE | {"num_examples": "3"}, "malformed Update: num_examples: .*integer"),
        (UPDATE | {"num_examples": True}, "malformed Update: num_examples: .*integer"),
        (UPDATE | {"round": 1.5}, "malformed Update: round: .*integer"),
        (UPDATE | {"round": [1]}, "malformed Update: round: .*integer"),
        (UPDATE | {"more": 1}, "malformed Update: more: .*not permitted"),
        ({"kind": "Failure", "client": "c"}, "malformed Failure: reason: .*required"),
        ({"kind": ["Update"]}, "unknown kind of reply"),
        ({}, "unknown kind of reply: None"),
    ],
)
def test_a_reply_whose_field_is_of_another_type_is_refused_by_the_field(
    head: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(DataError, match=pattern):
        decode_reply(as_json(**head), to_bytes({}))


@pytest.mark.parametrize(
    ("head", "pattern"),
    [
        (TRAIN | {"plan": {"proximal_mu": "1"}}, "malformed TrainRequest: plan.proximal_mu: .*number"),
        (TRAIN | {"plan": {}, "round": None}, "malformed TrainRequest: round: .*integer"),
        (TRAIN | {"plan": {}, "data_info": []}, "malformed TrainRequest: data_info: .*dictionary"),
        ({k: v for k, v in TRAIN.items() if k != "job"}, "malformed TrainRequest: job: .*required"),
        (KEYS | {"plan": {}}, "malformed KeysRequest: plan: .*not permitted"),
        (TRAIN | {"kind": "RevealRequest"}, "malformed RevealRequest"),
        (TRAIN | {"kind": "Request"}, "unknown kind of request: 'Request'"),
        (TRAIN | {"kind": {"a": 1}}, "unknown kind of request"),
    ],
)
def test_a_request_whose_field_is_of_another_type_is_refused_by_the_field(
    head: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(DataError, match=pattern):
        decode_request(as_json(**head), to_bytes({}))


def origin() -> RequestOrigin:
    return RequestOrigin(job="{}", job_hash="h", round=2, data_info={"classes": ["x"]}, run="r")


ONE_OF_EACH_KIND = [
    EvaluateRequest(**origin(), tensors={"w": torch.ones(2)}, adapt_steps=3, of_shared_model=True),
    StatisticsRequest(**origin()),
    TrainRequest(
        **origin(), tensors={"w": torch.ones(2)}, plan={"proximal_mu": 0.1},
        strategy_tensors={"w": torch.zeros(2)},
    ),
    KeysRequest(**origin(), attempt=2, threshold=3),
    SharesRequest(**origin(), attempt=2, threshold=3, public_keys={"a": torch.ones(2, dtype=torch.uint8)}),
    MaskedSumRequest(
        **origin(), attempt=2, threshold=3, tensors={"w": torch.ones(2)}, plan={"proximal_mu": 0.1},
        shares={"a": {"b": torch.ones(1)}, "b": {"a": torch.zeros(1)}},
    ),
    UnmaskedSumRequest(**origin(), attempt=2, threshold=3, tensors={"w": torch.ones(2)}),
    ConfirmRequest(**origin(), attempt=2, threshold=3, survivors=("a", "b")),
    RevealRequest(
        **origin(), attempt=2, threshold=3, survivors=("a", "b"),
        signatures={"a": torch.arange(96, dtype=torch.uint8)},
    ),
]  # fmt: skip


def in_order(value: object) -> str:
    """A field's value, by name where it has names: tensors travel in the order of theirs."""
    if isinstance(value, dict):
        return str(sorted((name, in_order(part)) for name, part in value.items()))
    return str(value)


@pytest.mark.parametrize("request_", ONE_OF_EACH_KIND, ids=lambda one: type(one).__name__)
def test_every_kind_of_request_arrives_as_it_was_sent(request_: Request) -> None:
    arrived = decode_request(*encode_request(request_, ["a", "b"]))
    assert type(arrived) is type(request_)
    assert encode_request(arrived, ["a", "b"]) == encode_request(request_, ["a", "b"])
    for one in dataclasses.fields(request_):
        assert in_order(getattr(arrived, one.name)) == in_order(getattr(request_, one.name))


def test_what_is_for_one_client_is_in_no_others_message() -> None:
    [masked] = [one for one in ONE_OF_EACH_KIND if isinstance(one, MaskedSumRequest)]
    arrived = decode_request(*encode_request(masked, ["a"]))
    assert isinstance(arrived, MaskedSumRequest) and set(arrived.shares) == {"a"}


def test_there_is_a_test_for_every_kind_of_request() -> None:
    assert {type(one).__name__ for one in ONE_OF_EACH_KIND} == set(KINDS)


def test_a_claimed_size_without_bytes_allocates_nothing() -> None:  # row 67
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    with pytest.raises(DataError, match="not a safetensors message"):
        from_bytes(struct.pack("<Q", len(header)) + header)
