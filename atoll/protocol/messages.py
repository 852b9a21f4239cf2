"""What server and clients say to each other, and the bytes it travels as."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from atoll.errors import DataError
from atoll.protocol.tensors import Tensors, from_bytes, to_bytes

VERSION = 1
"""Of the messages; a server and a client that differ in it do not work together."""

CHARGED_ROUNDS = "privacy.rounds"
"""A state of updates under a promise that the client keeps: rounds of this run in the client's ledger."""

DataInfo = dict[str, Any]
"""What a task must know of the data before a model can be built, such as the classes; JSON-able."""


@dataclass(frozen=True)
class Hello:
    """A client introduces itself, or says why it will not take part."""

    client: str
    data_info: DataInfo
    num_examples: int
    refusal: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Request:
    """Work for the named clients: train from these tensors, or evaluate them.

    `run` is what ledgers call the run: the same when it is resumed, another for the job's next one.
    `own` tensors are for one client each, and travel to its site only; `others` are clients that the
    request is about.
    """

    kind: str
    job: str
    job_hash: str
    round: int
    data_info: DataInfo
    tensors: Tensors
    plan: Mapping[str, float] = field(default_factory=dict)
    run: str = ""
    own: Mapping[str, Tensors] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    version: int = VERSION


@dataclass(frozen=True)
class Update:
    """What one client returns: how its trainable tensors moved, and how much data moved them.

    Where the job compresses updates, `delta` travels as `atoll.protocol.compression` says. `states` are
    metric states that add up over clients.
    """

    client: str
    round: int
    delta: Tensors
    num_examples: int
    states: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """Metric states of the global model on one client's validation split."""

    client: str
    round: int
    num_examples: int
    states: Tensors


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
    content: Tensors


Reply = Update | Measurement | Failure | SecureMessage


def encode_request(request: Request, names: Sequence[str] = ()) -> tuple[str, bytes]:
    """The request as (JSON head, safetensors body), with the own tensors of the named clients."""
    head = {k: v for k, v in asdict_shallow(request).items() if k not in ("tensors", "own")}
    own = {f"{name}/{key}": t for name in names for key, t in request.own.get(name, {}).items()}
    return json.dumps(head), to_bytes(_prefixed("all", request.tensors) | _prefixed("own", own))


def decode_request(head: str, body: bytes) -> Request:
    """Read what `encode_request` wrote.

    Raises:
        DataError: the message is of another version, or malformed.
    """
    fields, tensors = _fields(head), from_bytes(body)
    own: dict[str, Tensors] = {}
    for path, tensor in _under("own", tensors).items():
        name, _, key = path.partition("/")
        own.setdefault(name, {})[key] = tensor
    fields["others"] = tuple(fields.get("others", ()))
    return Request(tensors=_under("all", tensors), own=own, **fields)


def encode_reply(reply: Reply) -> tuple[str, bytes]:
    """The reply as (JSON head, safetensors body)."""
    match reply:
        case Update():
            body = _prefixed("delta", reply.delta) | _prefixed("states", reply.states)
            head = {"client": reply.client, "round": reply.round, "num_examples": reply.num_examples}
        case Measurement():
            body = _prefixed("states", reply.states)
            head = {"client": reply.client, "round": reply.round, "num_examples": reply.num_examples}
        case SecureMessage():
            body, head = _prefixed("content", reply.content), {"client": reply.client, "round": reply.round}
        case Failure():
            head, body = {"client": reply.client, "reason": reply.reason}, {}
    return json.dumps({"kind": type(reply).__name__, "version": VERSION, **head}), to_bytes(body)


def decode_reply(head: str, body: bytes) -> Reply:
    """Read what `encode_reply` wrote.

    Raises:
        DataError: the message is of another version or kind, or malformed.
    """
    fields = _fields(head)
    fields.pop("version")
    kind = fields.pop("kind", None)
    tensors = from_bytes(body)
    try:
        match kind:
            case "Update":
                return Update(delta=_under("delta", tensors), states=_under("states", tensors), **fields)
            case "Measurement":
                return Measurement(states=_under("states", tensors), **fields)
            case "SecureMessage":
                return SecureMessage(content=_under("content", tensors), **fields)
            case "Failure":
                return Failure(**fields)
    except TypeError as error:
        raise DataError(f"malformed {kind}: {error}") from None
    raise DataError(f"unknown kind of reply: {kind!r}")


def hello_to_json(hello: Hello) -> str:
    """The hello as JSON."""
    return json.dumps(asdict(hello))


def hello_from_json(text: str) -> Hello:
    """Read what `hello_to_json` wrote.

    Raises:
        DataError: the message is of another version, or malformed.
    """
    try:
        return Hello(**_fields(text))
    except TypeError as error:
        raise DataError(f"malformed hello: {error}") from None


def asdict_shallow(message: Any) -> dict[str, Any]:
    """A dataclass's fields without copying what they hold."""
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def _fields(head: str) -> dict[str, Any]:
    try:
        fields = json.loads(head)
    except ValueError as error:
        raise DataError(f"malformed message head: {error}") from None
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        found = fields.get("version") if isinstance(fields, dict) else fields
        raise DataError(f"message version: expected {VERSION}, found {found!r}")
    return fields


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
