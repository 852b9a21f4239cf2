"""Packs texts, and bytes by name, into the content of Flower's messages.

Flower stores and sends every part of a message separately, with several calls each, and an array is two
parts; small bytes are therefore packed into one part with the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from atoll.errors import DataError
from atoll.protocol.messages import Seal

SMALL_BYTES = 2**19
"""Bodies of at most this size together are sent with the texts; larger ones as arrays, which are streamed.

Each node then gets a copy of its own, where it would share an array with others: half a megabyte costs the
server less than the calls for three more parts.
"""

NONCE = "nonce"
"""The name of a request's random text, which the signature of its answer must include."""
Content = RecordDict
"""The content of a message."""
Bodies = ConfigRecord | ArrayRecord
"""Bytes by name in Flower's form; they can be sent to several nodes without being copied."""


def bodies_of(contents: Mapping[str, bytes]) -> Bodies:
    """Bytes by name, converted to Flower's form."""
    if sum(map(len, contents.values())) <= SMALL_BYTES:
        return ConfigRecord({f"body/{name}": body for name, body in contents.items()})
    return ArrayRecord({name: _array(body) for name, body in contents.items()})


def packed(texts: Mapping[str, str], bodies: Bodies) -> RecordDict:
    """The content of a message with these texts and bodies."""
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
    texts = {n: value for n, value in _under("text/", head).items() if isinstance(value, str)}
    bodies = {n: value for n, value in _under("body/", head).items() if isinstance(value, bytes)}
    for name, array in content.array_records.get("bodies", ArrayRecord()).items():
        bodies[name] = array.data
    return texts, bodies


def packed_greetings(texts: Sequence[str]) -> RecordDict:
    """The content of a site's answer to a greeting: a text for each of its clients."""
    return RecordDict({"hellos": ConfigRecord({"json": list(texts)})})


def unpacked_greetings(content: RecordDict) -> list[str]:
    """The texts that `packed_greetings` packed.

    Raises:
        DataError: the message has other content.
    """
    texts = _record(content, "hellos").get("json")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("message without greetings: sent by another version of Atoll?")
    return [str(text) for text in texts]


def add_seal(content: RecordDict, seal: Seal) -> None:
    """Add a seal to the content that `packed` or `packed_greetings` made."""
    (record,) = content.config_records.values()
    record["seal/run"], record["seal/round"], record["seal/nonce"] = seal.run, seal.round, seal.nonce
    record["seal/clients"], record["seal/signatures"] = list(seal.signatures), list(seal.signatures.values())


def seal_of(content: RecordDict) -> Seal | None:
    """The seal that `add_seal` added; None where there is none.

    Raises:
        DataError: the seal is malformed.
    """
    records = list(content.config_records.values())
    texts = _under("seal/", records[0]) if len(records) == 1 else {}
    if not texts:
        return None
    run, round, nonce = texts.get("run"), texts.get("round"), texts.get("nonce")
    names, signatures = texts.get("clients"), texts.get("signatures")
    if not (isinstance(run, str) and type(round) is int and isinstance(nonce, str)):
        raise DataError("message whose seal doesn't say which request it answers")
    if not (isinstance(names, list) and isinstance(signatures, list) and len(names) == len(signatures)):
        raise DataError("message whose seal hasn't a signature for each client")
    by_client = {n: s for n, s in zip(names, signatures, strict=True) if isinstance(n, str)}
    if len(by_client) < len(names) or not all(isinstance(s, bytes) for s in signatures):
        raise DataError("message whose seal names a client twice, or in another form")
    return Seal(run, round, nonce, {n: s for n, s in by_client.items() if isinstance(s, bytes)})


def _under(prefix: str, record: ConfigRecord) -> dict[str, object]:
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def _record(content: RecordDict, name: str) -> ConfigRecord:
    try:
        return content.config_records[name]
    except KeyError:
        raise DataError(f"message without its {name}: sent by another version of Atoll?") from None


def _array(body: bytes) -> Array:
    """Bytes as one of Flower's arrays, which Flower sends in pieces."""
    return Array(dtype="uint8", shape=(len(body),), stype="safetensors", data=body)
