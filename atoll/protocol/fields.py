"""The typed fields of messages: a head is JSON, tensors travel in the body under a prefix."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from atoll.errors import DataError
from atoll.protocol.tensors import Tensors, from_bytes, to_bytes

VERSION = 3
"""The version of the messages; a server and a client with different versions do not work together."""

SHARED = {"travels": "in the body"}
PER_CLIENT = {"travels": "in the body to its client alone"}
"""The metadata of fields that hold tensors: for all clients, or by client and sent to that client only."""

Message = TypeVar("Message")

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


def read_head(head: str) -> dict[str, Any]:
    """The fields of a JSON head.

    Raises:
        DataError: the head is not a JSON object, or has another version of the messages.
    """
    try:
        content = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed message head: {error}"[:200]) from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        version = content.get("version") if isinstance(content, dict) else content
        raise DataError(f"message version: expected {VERSION}, found {repr(version)[:100]}")
    return content


def encode(message: Any, names: Sequence[str] = ()) -> tuple[str, bytes]:
    """A message as (JSON head, safetensors body); parts for single clients only for those in `names`."""
    head: dict[str, Any] = {"kind": type(message).__name__, "version": VERSION}
    body: dict[str, Any] = {}
    for one in fields(message):
        value = getattr(message, one.name)
        if one.metadata == SHARED:
            body |= prefixed(one.name, value)
        elif one.metadata == PER_CLIENT:
            for name in names:
                body |= prefixed(f"{one.name}/{name}", value.get(name, {}))
        else:
            head[one.name] = value
    return json.dumps(head), to_bytes(body)


def decode(kinds: Mapping[str, type[Message]], what: str, head: str, body: bytes) -> Message:
    """The message that `encode` wrote; its kind must be among `kinds`, by name.

    Raises:
        DataError: the message has another version or kind, or is malformed.
    """
    content, tensors = read_head(head), from_bytes(body)
    content.pop("version")
    kind = content.pop("kind", None)
    cls = kinds.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise DataError(f"unknown kind of {what}: {kind!r}"[:200])
    for one in fields(cast(Any, cls)):
        if one.metadata == SHARED:
            content[one.name] = without_prefix(one.name, tensors)
        elif one.metadata == PER_CLIENT:
            content[one.name] = _by_client(without_prefix(one.name, tensors))
    return checked(cls, content)


def checked(cls: type[Message], content: Mapping[str, Any]) -> Message:
    """A message of this class from its fields, whose presence and types are checked.

    Raises:
        DataError: a field is missing, unknown or has another type.
    """
    model, tuples = _checks_of(cast(Hashable, cls))
    values = {k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in content.items()}
    try:
        return cls(**model.model_validate(values).__dict__)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"malformed {cls.__name__}: {place}: {fault['msg'].lower()}"[:200]) from None


@cache
def _checks_of(cls: Any) -> tuple[type[BaseModel], frozenset[str]]:
    """(a pydantic model that checks a class's fields, the fields that are tuples and lists in JSON)."""
    hints = get_type_hints(cls)
    required: Any = {one.name: (hints[one.name], ...) for one in fields(cls)}
    tuples = frozenset(name for name, hint in hints.items() if get_origin(hint) is tuple)
    return create_model(cls.__name__, __config__=STRICT, **required), tuples


def _by_client(tensors: Tensors) -> dict[str, Tensors]:
    by_client: dict[str, Tensors] = {}
    for path, tensor in tensors.items():
        name, _, key = path.partition("/")
        by_client.setdefault(name, {})[key] = tensor
    return by_client


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors under `prefix/`, without the prefix: the inverse of `prefixed`."""
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
