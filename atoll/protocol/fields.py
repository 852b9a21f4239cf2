"""The typed fields of messages: a head is JSON, tensors travel in the body under a prefix."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model

from atoll.errors import DataError
from atoll.protocol.tensors import Tensors

VERSION = 2
"""Of the messages; a server and a client that differ in it do not work together."""

Message = TypeVar("Message")

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


def read_head(head: str) -> dict[str, Any]:
    """The head's fields.

    Raises:
        DataError: it is no JSON object, or of another version of the messages.
    """
    try:
        content = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed message head: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else content
        raise DataError(f"message version: expected {VERSION}, found {found!r}")
    return content


def checked(cls: type[Message] | None, what: str, kind: object, content: Mapping[str, Any]) -> Message:
    """A message of that class, once every field is there and of its type.

    Raises:
        DataError: a field is missing, unknown or of another type, or there is no such kind of message.
    """
    if cls is None:
        raise DataError(f"unknown kind of {what}: {kind!r}"[:200])
    try:
        return cls(**_fields_of(cast(Hashable, cls)).validate_python(_with_tuples(cls, content)).__dict__)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"malformed {cls.__name__}: {place}: {fault['msg'].lower()}"[:200]) from None


@cache
def _fields_of(cls: Any) -> TypeAdapter[Any]:
    hints = get_type_hints(cls)
    required: Any = {one.name: (hints[one.name], ...) for one in fields(cls)}
    return TypeAdapter(create_model(cls.__name__, __config__=STRICT, **required))


def _with_tuples(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists for the tuples that a message is to hold."""
    hints = get_type_hints(cls)
    return {
        name: tuple(value) if isinstance(value, list) and str(hints.get(name)).startswith("tuple") else value
        for name, value in content.items()
    }


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """What `prefixed` put there."""
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
