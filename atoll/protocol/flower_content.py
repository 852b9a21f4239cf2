"""What one of Flower's messages carries: texts, and bytes by name.

Flower stores, sends and asks for every part of a message by itself, at several calls each, and an array is
two parts; so what is small travels as one part with the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from atoll.errors import DataError

SMALL_BYTES = 2**16
"""Bodies of so many bytes together travel with the texts; larger ones as arrays, which Flower streams."""

Content = RecordDict
"""What a message holds."""
Bodies = ConfigRecord | ArrayRecord
"""Bytes by name, ready to be sent; to several nodes, without being copied."""


def bodies_of(contents: Mapping[str, bytes]) -> Bodies:
    """Bytes by name, made ready to be sent."""
    if sum(map(len, contents.values())) <= SMALL_BYTES:
        return ConfigRecord({f"body/{name}": body for name, body in contents.items()})
    return ArrayRecord({name: _array(body) for name, body in contents.items()})


def packed(texts: Mapping[str, str], bodies: Bodies) -> RecordDict:
    """The content of a message."""
    head = ConfigRecord({f"text/{name}": text for name, text in texts.items()})
    if isinstance(bodies, ArrayRecord):
        return RecordDict({"head": head, "bodies": bodies})
    return RecordDict({"head": ConfigRecord({**head, **bodies})})


def unpacked(content: RecordDict) -> tuple[dict[str, str], dict[str, bytes]]:
    """The texts and the bodies of a message, each by name.

    Raises:
        DataError: the message was sent by another version of Atoll.
    """
    head = _record(content, "head")
    texts = {key.removeprefix("text/"): value for key, value in head.items() if isinstance(value, str)}
    bodies = {key.removeprefix("body/"): value for key, value in head.items() if isinstance(value, bytes)}
    for name, array in content.array_records.get("bodies", ArrayRecord()).items():
        bodies[name] = array.data
    return texts, bodies


def packed_greetings(texts: Sequence[str]) -> RecordDict:
    """The content of a site's answer to a greeting: a text for each of its clients."""
    return RecordDict({"hellos": ConfigRecord({"json": list(texts)})})


def unpacked_greetings(content: RecordDict) -> list[str]:
    """What `packed_greetings` took.

    Raises:
        DataError: the message holds something else.
    """
    texts = _record(content, "hellos").get("json")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("message without greetings: sent by another version of Atoll?")
    return [str(text) for text in texts]


def _record(content: RecordDict, name: str) -> ConfigRecord:
    try:
        return content.config_records[name]
    except KeyError:
        raise DataError(f"message without its {name}: sent by another version of Atoll?") from None


def _array(body: bytes) -> Array:
    """Bytes as one of Flower's arrays, which it cuts into pieces."""
    return Array(dtype="uint8", shape=(len(body),), stype="safetensors", data=body)
