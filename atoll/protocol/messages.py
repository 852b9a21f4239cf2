"""What clients say to a server, and the bytes it travels as; `requests` has what they are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from atoll.protocol.fields import SHARED, VERSION, checked, decode, encode, read_head
from atoll.protocol.tensors import Tensors

DataInfo = dict[str, Any]
"""What a task must know of the data before a model can be built, such as the classes; JSON-able."""

CHARGED_ROUNDS = "privacy.rounds"
"""A state of updates under a promise that the client keeps: rounds of this run in the client's ledger."""

LOCAL_STEPS = "local_steps"
"""In a plan, that clients are to send the state of this name: what their local gradients weigh together."""


@dataclass(frozen=True)
class Hello:
    """A client introduces itself, or says why it will not take part."""

    client: str
    data_info: DataInfo
    num_examples: int
    refusal: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Update:
    """What one client returns: how its trainable tensors moved, and how much data moved them.

    Where the job compresses updates, `delta` travels as `atoll.protocol.compression` says. `states` are
    metric states that add up over clients.
    """

    client: str
    round: int
    delta: Tensors = field(metadata=SHARED)
    num_examples: int
    states: Tensors = field(default_factory=dict, metadata=SHARED)


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


def encode_reply(reply: Reply) -> tuple[str, bytes]:
    """The reply as (JSON head, safetensors body)."""
    return encode(reply)


def decode_reply(head: str, body: bytes) -> Reply:
    """Read what `encode_reply` wrote.

    Raises:
        DataError: the message is of another version or kind, or malformed.
    """
    return decode(KINDS, "reply", head, body)


def hello_to_json(hello: Hello) -> str:
    """The hello as JSON."""
    return json.dumps(asdict(hello))


def hello_from_json(text: str) -> Hello:
    """Read what `hello_to_json` wrote.

    Raises:
        DataError: the message is of another version, or malformed.
    """
    return checked(Hello, read_head(text))
