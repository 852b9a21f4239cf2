"""What clients say to a server, and the bytes it travels as; `requests` has what they are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from atoll.errors import DataError
from atoll.protocol.fields import SHARED, VERSION, checked, decode, encode, read_head
from atoll.protocol.tensors import Tensors

DataInfo = dict[str, Any]
"""What a task must know of the data before a model can be built, such as the classes; JSON-able."""

CHARGED_ROUNDS = "privacy.rounds"
"""A state of updates under a promise that the client keeps: rounds of this run in the client's ledger."""

MOST_CHARACTERS = 500
"""Of a sentence from another machine; the rest is cut off."""
NAME_CHARACTERS = 128
"""Of a client's name at most."""
HELLO_CHARACTERS = 2**23
"""Of a greeting at most: the texts of 100,000 items."""

LOCAL_STEPS = "local_steps"
"""In a plan, that clients are to send the state of this name: what their local gradients weigh together."""

RECEIVED_LOSS = "received_loss"
"""A state of updates for fair strategies: the mean training loss of the model as it was received."""

CLUSTER = "cluster"
"""A state of updates where there is a model for each cluster of clients: the number of the one that moved."""


@dataclass(frozen=True)
class Hello:
    """A client introduces itself, or says why it will not take part.

    `counts` tell, where the greeting isn't silent, how much of its data is used and why the rest is left out,
    as `Counts` of `atoll.data.diagnostics` writes them.
    """

    client: str
    data_info: DataInfo
    num_examples: int
    refusal: str = ""
    counts: list[Any] = field(default_factory=list)
    version: int = VERSION


@dataclass(frozen=True)
class Update:
    """What one client returns: how its trainable tensors moved, and how much data moved them.

    Where the job compresses updates, `delta` travels as `atoll.protocol.compression` says. `states` are
    metric states that add up over clients. `strategy_tensors` answer those of the request, with the same
    names, shapes and dtypes.
    """

    client: str
    round: int
    delta: Tensors = field(metadata=SHARED)
    num_examples: int
    states: Tensors = field(default_factory=dict, metadata=SHARED)
    strategy_tensors: Tensors = field(default_factory=dict, metadata=SHARED)


@dataclass(frozen=True)
class Measurement:
    """Metric states of the global model on one client's validation split."""

    client: str
    round: int
    num_examples: int
    states: Tensors = field(metadata=SHARED)


@dataclass(frozen=True)
class Failure:
    """One client's work did not come back; the round goes on without it."""

    client: str
    reason: str


@dataclass(frozen=True)
class SecureMessage:
    """One client's answer in a stage of a secure sum: keys, shares, or a vector under masks."""

    client: str
    round: int
    content: Tensors = field(metadata=SHARED)


Reply = Update | Measurement | Failure | SecureMessage

KINDS: Mapping[str, type[Reply]] = {
    kind.__name__: kind for kind in (Update, Measurement, SecureMessage, Failure)
}


def cleaned(text: str, most: int = MOST_CHARACTERS) -> str:
    """A sentence from another machine, as it may stand in logs, in files and on a terminal.

    It is on one line, has no control characters and at most `most` characters before it is cut.

    >>> cleaned("no\\n\\x1b[2Jround 9: done"), cleaned("a" * 9, most=5)
    ('no �[2Jround 9: done', 'aaaaa… (9 characters)')
    """
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[: 2 * most].split()))
    return line if len(text) <= most else f"{line[:most]}… ({len(text)} characters)"


@dataclass(frozen=True)
class Seal:
    """What a site has signed with a message: which request it answers, and a signature for each client.

    It travels with the small part of the message, beside the content that it is of.
    """

    run: str
    round: int
    nonce: str
    signatures: Mapping[str, bytes]


def content_sha256(head: str, body: bytes) -> bytes:
    """The SHA-256 of a client's message: of its head, a zero byte and its body.

    Raises:
        DataError: the head has a zero byte, as no JSON has; head and body could be cut elsewhere.
    """
    if "\0" in head:
        raise DataError("malformed message head: it has a zero byte")
    digest = hashlib.sha256(as_bytes(head) + b"\0")
    digest.update(body)
    return digest.digest()


def as_bytes(text: str) -> bytes:
    """UTF-8, also of text that JSON can hold and UTF-8 can't."""
    return text.encode("utf-8", "surrogatepass")


def encode_reply(reply: Reply) -> tuple[str, bytes]:
    """The reply as (JSON head, safetensors body)."""
    return encode(reply)


def decode_reply(head: str, body: bytes) -> Reply:
    """Read what `encode_reply` wrote.

    Raises:
        DataError: the message is of another version or kind, or malformed.
    """
    reply = decode(KINDS, "reply", head, body)
    return replace(reply, reason=cleaned(reply.reason)) if isinstance(reply, Failure) else reply


def hello_to_json(hello: Hello) -> str:
    """The hello as JSON."""
    return json.dumps(asdict(hello))


def hello_from_json(text: str) -> Hello:
    """Read what `hello_to_json` wrote.

    Raises:
        DataError: the message is of another version, malformed or too long.
    """
    if len(text) > HELLO_CHARACTERS:
        raise DataError(f"a greeting of {len(text)} characters, expected at most {HELLO_CHARACTERS}")
    hello = checked(Hello, read_head(text))
    if not (hello.client.isprintable() and 0 < len(hello.client) <= NAME_CHARACTERS):
        raise DataError(f"the client's name: expected 1 to {NAME_CHARACTERS} printable characters")
    return replace(hello, refusal=cleaned(hello.refusal))
