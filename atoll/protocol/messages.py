"""The messages that clients send to a server, and their encoding; `requests` has the server's requests."""

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
"""JSON-able facts about the data that a task needs to build a model, such as the classes."""

CHARGED_ROUNDS = "privacy.rounds"
"""A state of updates whose noise the client adds: the number of this run's rounds in its ledger."""

MOST_CHARACTERS = 500
"""The longest text from another machine that is shown; the rest is cut off."""
NAME_CHARACTERS = 128
"""The longest name of a client."""
HELLO_CHARACTERS = 2**23
"""The longest greeting: it holds the names of 100,000 items."""

LOCAL_STEPS = "local_steps"
"""In a plan, a request that clients send the state of this name: the summed weight of local gradients."""

ASSIGNED_STEPS = "assigned_steps"
"""In a plan, the number of local steps that the server gives the clients of a request."""

RECEIVED_LOSS = "received_loss"
"""A state of updates for fair strategies: the mean loss of the received model on the training examples."""

CLUSTER = "cluster"
"""A state of updates in jobs with a model per cluster: the number, from 0, of the model that was trained."""


@dataclass(frozen=True)
class Hello:
    """A client's greeting: facts about its data, or the reason why it does not take part (`refusal`).

    Under a promise of privacy `num_examples` is 0 and `counts` empty. Otherwise `counts` says how much of the
    data is used and why the rest is left out, as `Counts` of `atoll.data.diagnostics` writes it.
    """

    client: str
    data_info: DataInfo
    num_examples: int
    refusal: str = ""
    counts: list[Any] = field(default_factory=list)
    version: int = VERSION


@dataclass(frozen=True)
class Update:
    """One client's result of training: its tensors minus those it received, and its number of examples.

    `delta` has the names, shapes and dtypes of the trained tensors; where the job compresses updates it is
    sent in the form of `atoll.protocol.compression`. `states` are float64 scalars, such as sums of losses,
    that add up over clients. `strategy_tensors` answer those of the request, with the same names, shapes and
    dtypes.
    """

    client: str
    round: int
    delta: Tensors = field(metadata=SHARED)
    num_examples: int
    states: Tensors = field(default_factory=dict, metadata=SHARED)
    strategy_tensors: Tensors = field(default_factory=dict, metadata=SHARED)
    run: str = ""
    """The run whose request it answers, as its site tells; empty in simulation."""


@dataclass(frozen=True)
class Measurement:
    """Metric states of a model on one client's validation split of `num_examples` examples."""

    client: str
    round: int
    num_examples: int
    states: Tensors = field(metadata=SHARED)
    run: str = ""


@dataclass(frozen=True)
class Failure:
    """The reason why a client refused or failed; the round continues without it."""

    client: str
    reason: str


@dataclass(frozen=True)
class SecureMessage:
    """One client's answer in a stage of a secure sum: keys, shares, or a vector under masks."""

    client: str
    round: int
    content: Tensors = field(metadata=SHARED)
    run: str = ""


Reply = Update | Measurement | Failure | SecureMessage

KINDS: Mapping[str, type[Reply]] = {
    kind.__name__: kind for kind in (Update, Measurement, SecureMessage, Failure)
}


def cleaned(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text from another machine, made safe for logs, files and terminals.

    It becomes one line without control characters, and is cut after `most` characters.

    >>> cleaned("no\\n\\x1b[2Jround 9: done"), cleaned("a" * 9, most=5)
    ('no �[2Jround 9: done', 'aaaaa… (9 characters)')
    """
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[: 2 * most].split()))
    return line if len(text) <= most else f"{line[:most]}… ({len(text)} characters)"


@dataclass(frozen=True)
class Seal:
    """A site's signatures of a message: the request that it answers, and a signature for each client.

    It is sent with the small part of the message, beside the signed content.
    """

    run: str
    round: int
    nonce: str
    signatures: Mapping[str, bytes]


def content_sha256(head: str, body: bytes) -> bytes:
    """The SHA-256 of a client's message: of its head, a zero byte and its body.

    Raises:
        DataError: the head has a zero byte, which no JSON has, so that head and body would be ambiguous.
    """
    if "\0" in head:
        raise DataError("malformed message head: it has a zero byte")
    digest = hashlib.sha256(as_bytes(head) + b"\0")
    digest.update(body)
    return digest.digest()


def as_bytes(text: str) -> bytes:
    """The text in UTF-8; surrogates, which JSON can hold and UTF-8 cannot, are encoded too."""
    return text.encode("utf-8", "surrogatepass")


def encode_reply(reply: Reply) -> tuple[str, bytes]:
    """The reply as (JSON head, safetensors body)."""
    return encode(reply)


def decode_reply(head: str, body: bytes) -> Reply:
    """The reply that `encode_reply` wrote.

    Raises:
        DataError: the message has another version or kind, or is malformed.
    """
    reply = decode(KINDS, "reply", head, body)
    return replace(reply, reason=cleaned(reply.reason)) if isinstance(reply, Failure) else reply


def hello_to_json(hello: Hello) -> str:
    """The greeting as JSON."""
    return json.dumps(asdict(hello))


def hello_from_json(text: str) -> Hello:
    """The greeting that `hello_to_json` wrote.

    Raises:
        DataError: the message has another version, is malformed or too long.
    """
    if len(text) > HELLO_CHARACTERS:
        raise DataError(f"a greeting of {len(text)} characters, expected at most {HELLO_CHARACTERS}")
    hello = checked(Hello, read_head(text))
    if not (hello.client.isprintable() and 0 < len(hello.client) <= NAME_CHARACTERS):
        raise DataError(f"the client's name: expected 1 to {NAME_CHARACTERS} printable characters")
    return replace(hello, refusal=cleaned(hello.refusal))
