"""Compressed updates: against closed forms, and messages that no client of ours sends."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import ConfigError
from atoll.job.federation import Scheme
from atoll.job.job import Job
from atoll.protocol.compression import (
    BLOCK,
    LEVELS,
    Compression,
    apart,
    compress,
    decompress,
    flat,
    in_nibbles,
    largest,
    misshapen,
    of_nibbles,
    quantised,
    unsound,
)
from atoll.protocol.messages import Reply, Update, decode_reply, encode_reply
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.decompression import decompressed
from atoll.server.rounds.validation import validate_updates

SCHEMES: tuple[Scheme, ...] = ("fp16", "int8", "int4", "top-k", "sign")
VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=400)


def vector(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def randoms(clients: int, numbers: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of very different size from client to client."""
    drawn = torch.randn((clients, numbers), generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(-6, 2, clients).unsqueeze(1)


@given(VALUES, st.sampled_from(sorted(LEVELS)))
def test_a_number_rounded_to_the_nearest_level_is_off_by_half_a_step_at_most(
    values: list[float], scheme: str
) -> None:
    x = vector(values)
    levels, scales = quantised(x, LEVELS[scheme])
    assert int(levels.to(torch.int64).abs().max()) <= LEVELS[scheme]
    step = scales.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]].double()
    error = (x.double() - levels.double() * step).abs()
    # a scale below the smallest normal number counts as none: all of the block is then lost
    bound = torch.where(step > 0, step * (0.5 + 1e-4), 127 * torch.finfo(torch.float32).tiny)
    assert bool((error <= bound).all())


@given(VALUES, st.sampled_from(SCHEMES), st.floats(0.001, 1.0))
def test_without_coins_compression_brings_every_vector_nearer_which_error_feedback_needs(
    values: list[float], scheme: Scheme, share: float
) -> None:
    """|C(x) - x|² <= (1 - d) |x|², with d = 1 / numbers (Karimireddy et al. 2019, assumption A)."""
    x = vector(values)
    if scheme == "fp16":
        x = x.clamp(-60000, 60000)
    how = Compression(scheme, x.shape[1], share)
    lost = (decompress(compress(x, how), how) - x).double()
    size = float(x.double().square().sum())
    part = 2.0**-22 if scheme == "fp16" else 1 - 1 / x.shape[1]  # half precision has 11 bits
    # what underflows: a block of int8 whose scale is below the smallest, half of half precision's last step
    tiny = x.shape[1] * (2.0**-25 if scheme == "fp16" else 127 * torch.finfo(torch.float32).tiny) ** 2
    assert float(lost.square().sum()) <= part * size + 1e-10 * size + tiny


def test_levels_and_scales_by_hand() -> None:
    x = vector([1.27, -0.634, 0.0, 0.006])  # scale 0.01: 127, -63.4, 0, 0.6
    levels, scales = quantised(x, 127)
    assert levels.tolist() == [[127, -63, 0, 1]]
    assert scales[0, 0].item() == pytest.approx(0.01)
    assert quantised(x, 7)[0].tolist() == [[7, -3, 0, 0]]  # scale 0.1814: 7, -3.49, 0, 0.03


def test_every_block_of_256_has_a_scale_of_its_own() -> None:
    x = torch.cat([torch.full((1, BLOCK), 100.0), torch.full((1, 3), 0.001)], dim=1)
    how = Compression("int4", BLOCK + 3)
    assert torch.allclose(decompress(compress(x, how), how), x, rtol=1e-6)


def test_rounding_by_coins_is_right_on_average_and_off_by_less_than_a_step() -> None:
    x = torch.tensor([[0.7, -0.31, 0.05, 0.0, -0.7]])
    draws = 40_000
    uniform = torch.rand((draws, 5), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    how = Compression("int4", 5)  # a step is 0.1
    found = decompress(compress(x.repeat(draws, 1), how, uniform), how)
    assert bool(((found - x).abs() < 0.1 + 1e-6).all())
    # the deviation of a mean of coins is at most 0.5 * 0.1 / sqrt(40000) = 0.00025
    assert torch.allclose(found.double().mean(0), x[0].double(), atol=5 * 0.00025)
    assert found[:, 1].unique().numel() == 2


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=300), st.floats(0.001, 1.0), st.integers(0, 2**31))
def test_top_k_keeps_exactly_the_k_largest_and_of_equal_ones_those_in_front(
    values: list[int], share: float, seed: int
) -> None:
    x = vector([float(v) for v in values])
    how = Compression("top-k", len(values), share)
    assert how.num_sent == max(1, math.ceil(share * len(values) - 1e-9))
    # the slow obvious way: Python's sort is stable
    best = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: how.num_sent]
    assert largest(x, how.num_sent).tolist() == [sorted(best)]
    whole = decompress(compress(x, how), how)
    expected = [v if i in best else 0.0 for i, v in enumerate(x[0].tolist())]
    assert whole.tolist() == [expected]


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=50))
def test_two_levels_in_a_byte_come_out_as_they_went_in(levels: list[int]) -> None:
    packed = in_nibbles(torch.tensor([levels], dtype=torch.int8))
    assert packed.dtype == torch.uint8 and packed.shape == (1, math.ceil(len(levels) / 2))
    assert of_nibbles(packed, len(levels)).tolist() == [levels]
    by_hand = [
        sum((v + 8) << (4 * i) for i, v in enumerate(levels[k : k + 2])) for k in range(0, len(levels), 2)
    ]
    if len(levels) % 2:
        by_hand[-1] += 8 << 4
    assert packed[0].tolist() == by_hand


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_client_gets_the_same_bits_alone_and_among_others(scheme: Scheme) -> None:
    x = randoms(9, 1003)
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = Compression(scheme, 1003, 0.03)
    for uniforms in (None, uniform):
        together = compress(x, how, uniforms)
        whole = decompress(together, how)
        for i in range(9):
            alone = compress(x[i : i + 1], how, None if uniforms is None else uniforms[i : i + 1])
            assert all(torch.equal(alone[name][0], together[name][i]) for name in together)
            assert torch.equal(decompress(alone, how)[0], whole[i])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    how = Compression(scheme, 300)
    packed = compress(torch.zeros(2, 300), how)
    assert not any(bool(mask.any()) for mask in unsound(packed, how).values())
    assert torch.equal(decompress(packed, how), torch.zeros(2, 300))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_makes_a_message_that_is_found_and_spoils_no_other(
    scheme: Scheme, value: float
) -> None:
    x = randoms(3, 300)
    x[1, 7] = value
    how = Compression(scheme, 300, 0.1)
    packed = compress(x, how)
    found = torch.stack(list(unsound(packed, how).values())).any(dim=0)
    assert found.tolist() == [False, True, False]
    whole = decompress(packed, how)
    assert torch.isfinite(whole).all(dim=1).tolist() == [True, False, True]
    assert torch.equal(whole[0], decompress(compress(x[:1], how), how)[0])


def test_half_precision_saturates_instead_of_overflowing() -> None:
    how = Compression("fp16", 2)
    assert decompress(compress(vector([1e9, -1e9]), how), how).tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("numbers", [1, 2, 255, 256, 257, 1001])
def test_a_message_has_the_form_and_the_bytes_that_were_announced(scheme: Scheme, numbers: int) -> None:
    how = Compression(scheme, numbers)
    packed = compress(randoms(2, numbers), how)
    for i in range(2):
        one = {name: tensor[i] for name, tensor in packed.items()}
        assert misshapen(one, how) is None
        assert sum(t.numel() * t.element_size() for t in one.values()) == how.bytes
    assert decompress(packed, how).shape == (2, numbers)


def test_the_bytes_of_a_megabyte_by_hand() -> None:
    sizes = {scheme: Compression(scheme, 262_144).bytes for scheme in SCHEMES}
    # 1024 scales of 4 bytes; 2622 places and numbers of 4 bytes each; one scale for all
    expected = {"fp16": 524_288, "int8": 266_240, "int4": 135_168, "top-k": 20_976, "sign": 32_772}
    assert sizes == expected


def test_tensors_are_one_vector_in_the_order_of_their_names() -> None:
    stack: Tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(10.0, 18.0).reshape(2, 2, 2)}
    model = {name: tensor[0] for name, tensor in stack.items()}
    vectors = flat(stack)
    assert vectors.tolist() == [[10, 11, 12, 13, 0, 1, 2], [14, 15, 16, 17, 3, 4, 5]]
    again = apart(vectors, model)
    assert list(again) == ["b", "a"] and all(torch.equal(again[name], stack[name]) for name in stack)


MODEL: Tensors = {"w": torch.zeros(30, 10), "b": torch.zeros(3)}
NUMBERS = 303
STATES = {"train_loss.sum": torch.tensor(1.0).double(), "train_loss.count": torch.tensor(2.0).double()}


BLIND = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


def job_of(scheme: str, *, privacy: dict[str, Any] | None = None, **federation: Any) -> Job:
    table = {
        "name": "small", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels"},
        "federation": {"compression": scheme, **federation}, "privacy": privacy or {},
    }  # fmt: skip
    return Job.parse(table, origin="test")


def how_of(scheme: str) -> Compression:
    how = Compression.of(job_of(scheme), MODEL)
    assert how is not None
    return how


def message(scheme: Scheme, client: str = "a", **changed: Any) -> Update:
    """A good message, or one with some of its tensors replaced; None takes one out."""
    how = how_of(scheme)
    delta = {name: tensor[0] for name, tensor in compress(randoms(1, NUMBERS), how).items()}
    return Update(client, 4, {n: t for n, t in (delta | changed).items() if t is not None}, 5, STATES)


def seen(replies: list[Update], scheme: Scheme, *, blind: bool = False) -> Any:
    """What screening finds of replies that travelled over the wire."""
    arrived: list[Reply] = [decode_reply(*encode_reply(reply)) for reply in replies]
    whole = decompressed(arrived, job_of(scheme, privacy=BLIND if blind else None), MODEL)
    return validate_updates(whole, ["a", "b"], MODEL, 4, blind=blind)


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_byte(place: int, value: int) -> torch.Tensor:
    return message("int4").delta["values"].index_fill(0, torch.tensor([place]), value)


KEPT = {"indices": indices(0, 5, 9, 302), "values": torch.ones(4)}
BAD: dict[str, tuple[Scheme, dict[str, Any], str]] = {
    "no values": ("int8", {"values": None}, "tensor values is missing"),
    "uncompressed": ("int8", {"scales": None, "values": None, "w": MODEL["w"]}, "tensor scales is missing"),
    "one more": ("fp16", {"w": torch.ones(1)}, "tensor w is unexpected"),
    "too few": ("int8", {"values": torch.ones(302, dtype=torch.int8)}, r"shape \(302,\), expected \(303,\)"),
    "too many": ("int4", {"values": torch.ones(10**6, dtype=torch.uint8)}, r"\(1000000,\), .* \(152,\)"),
    "too many scales": ("int8", {"scales": torch.ones(3)}, r"scales have shape \(3,\), expected \(2,\)"),
    "a table": ("int8", {"values": torch.ones((303, 1), dtype=torch.int8)}, r"shape \(303, 1\)"),
    "another kind": ("int8", {"values": torch.ones(303)}, "values are torch.float32, expected torch.int8"),
    "scale nan": ("int8", {"scales": torch.tensor([1.0, math.nan])}, "scales are not all finite"),
    "scale inf": ("int4", {"scales": torch.tensor([math.inf, 1.0])}, "scales are not all finite"),
    "scale negative": ("int4", {"scales": torch.tensor([-1.0, 1.0])}, "scales are not .* at least 0"),
    "a level too low": ("int8", {"values": torch.full((303,), -128, dtype=torch.int8)}, "-127 to 127"),
    "a nibble too low": ("int4", {"values": with_byte(3, 0x80)}, "not all from -7 to 7"),
    "something in the gap": ("int4", {"values": with_byte(151, 0x98)}, "not all from -7 to 7"),
    "one scale for all": ("sign", {"scales": torch.ones(1)}, r"scales have shape \(1,\), expected \(2,\)"),
    "a byte a sign": ("sign", {"values": torch.ones(303, dtype=torch.uint8)}, r"\(303,\), expected \(38,\)"),
    "a size below zero": ("sign", {"scales": torch.tensor([1.0, -1.0])}, "scales are not .* at least 0"),
    "bits in the gap": ("sign", {"values": torch.full((38,), 255, dtype=torch.uint8)}, "more than 303 bits"),
    "half nan": ("fp16", {"values": torch.full((303,), math.nan).half()}, "values are not all finite"),
    "more than k": ("top-k", {"indices": indices(*range(300)), "values": torch.ones(300)}, r"\(300,\)"),
    "beyond the end": ("top-k", KEPT | {"indices": indices(0, 1, 2, 303)}, "not all from 0 to 302"),
    "before the start": ("top-k", KEPT | {"indices": indices(-1, 1, 2, 3)}, "not all from 0 to 302"),
    "twice": ("top-k", KEPT | {"indices": indices(0, 1, 1, 3)}, "indices do not rise"),
    "not sorted": ("top-k", KEPT | {"indices": indices(0, 2, 1, 3)}, "indices do not rise"),
    "long indices": ("top-k", KEPT | {"indices": indices(0, 1, 2, 3).long()}, "indices are torch.int64"),
    "sparse nan": ("top-k", KEPT | {"values": torch.full((4,), math.nan)}, "values are not all finite"),
    "sparse and huge": ("top-k", KEPT | {"values": torch.full((4,), 1e30)}, "the update's norm is"),
    "huge": ("int8", {"scales": torch.full((2,), 3e38)}, "not finite|norm is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_is_set_aside_with_its_reason_and_the_others_stay(name: str) -> None:
    scheme, changed, pattern = BAD[name]
    found = seen([message(scheme, **changed), message(scheme, "b")], scheme)
    assert [u.client for u in found.updates] == ["b"]
    assert re.search(pattern, found.set_aside["a"]), found.set_aside["a"]
    assert {n: t.shape for n, t in found.updates[0].delta.items()} == {n: t.shape for n, t in MODEL.items()}


FORM = {"no values", "uncompressed", "one more", "too few", "too many", "too many scales", "a table",
        "another kind", "more than k", "long indices", "one scale for all", "a byte a sign"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(BAD) - FORM))
def test_to_a_blind_look_values_tell_nothing_and_what_cannot_be_is_not_finite(name: str) -> None:
    scheme, changed, _ = BAD[name]
    found = seen([message(scheme, **changed), message(scheme, "b")], scheme, blind=True)
    assert [u.client for u in found.updates] == ["a", "b"] and found.set_aside == {}
    if "huge" not in name:
        assert not all(bool(torch.isfinite(t).all()) for t in found.updates[0].delta.values())


def test_a_claim_of_terabytes_takes_no_memory() -> None:
    """A head that says 8 TiB and a body without them; what is there of a tensor is what it takes."""
    import json
    import struct

    from atoll.errors import DataError

    head, _ = encode_reply(message("int8"))
    table = json.dumps(
        {"delta/values": {"dtype": "I8", "shape": [2**43], "data_offsets": [0, 2**43]}}
    ).encode()
    with pytest.raises(DataError, match="not a safetensors message"):
        decode_reply(head, struct.pack("<Q", len(table)) + table)


@given(st.binary(max_size=400), st.sampled_from(SCHEMES))
def test_whatever_values_travel_the_server_makes_a_model_of_them_or_names_the_fault(
    blob: bytes, scheme: Scheme
) -> None:
    form = how_of(scheme).form
    delta = {}
    for name, (count, dtype) in form.items():
        size = count * dtype.itemsize
        filled = np.frombuffer(
            (blob * (size // max(len(blob), 1) + 1) or bytes(size))[:size].ljust(size, b"\0"), np.uint8
        )
        delta[name] = torch.from_numpy(filled.copy()).view(dtype)
    found = seen([Update("a", 4, delta, 5, STATES)], scheme)
    assert len(found.updates) == 1 or found.set_aside["a"]
    blind = seen([Update("a", 4, delta, 5, STATES)], scheme, blind=True)
    assert {n: t.shape for n, t in blind.updates[0].delta.items()} == {n: t.shape for n, t in MODEL.items()}


@pytest.mark.parametrize(
    ("federation", "pattern"),
    [
        (
            {"compression": "int2"},
            "federation.compression: expected 'fp16', 'int8', 'int4', 'top-k' or 'sign'",
        ),
        ({"compression": "top-k", "compression_top_k": 0.0}, "compression_top_k"),
        (
            {"compression": "int8", "compression_top_k": 0.1},
            "compression_top_k has no meaning with compression = 'int8', only with 'top-k'",
        ),
        ({"error_feedback": False}, "error_feedback has no meaning without compression"),
        ({"compression": "int8", "secure_aggregation": True}, "federation.compression: a secure sum adds"),
    ],
)
def test_options_that_have_no_meaning_are_refused_in_one_line(
    federation: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        job_of(**{"scheme": federation.pop("compression", None), **federation})
    assert "\n" not in str(caught.value)
