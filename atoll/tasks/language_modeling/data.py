"""Data of language modelling: `text`, or `messages` with roles, or `prompt` and `completion` (as in TRL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from atoll.data.columns import role_column
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.parsers import listed, optional_text_cell, text_cell
from atoll.data.schema import Schema, SchemaField, chosen_name
from atoll.data.tables import Rows
from atoll.errors import DataError
from atoll.job.job import DataSection

ASSISTANT = "assistant"
"""The role whose turns are trained on."""

Messages = list[dict[str, str]]
"""Turns of a conversation, each with `role` and `content`."""


def messages_cell(cell: Any, where: str) -> Messages:
    """The turns of a conversation, from a list or JSON text; at least one must be the assistant's.

    >>> messages_cell('[{"role": "assistant", "content": "Hello!", "id": 3}]', "")
    [{'role': 'assistant', 'content': 'Hello!'}]

    Raises:
        DataError: the cell is no list of messages, or none is the assistant's.
    """
    messages = turns_cell(cell, where)
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in messages)) or "nobody"
        raise DataError(
            f"{where}: no message of the assistant, but of {shown(roles)}; expected one at least to learn"
        )
    return messages


def turns_cell(cell: Any, where: str) -> Messages:
    """As `messages_cell`, but no turn has to be the assistant's."""
    turns = listed(cell, where, "a list of messages")
    return [_message(one, f"{where}: message {number}") for number, one in enumerate(turns, start=1)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        form = sorted(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise DataError(f"{where}: {shown(str(form))}, expected role and content")
    content = message["content"]
    if not isinstance(content, str):
        raise DataError(f"{where}: its content is {type(content).__name__}, expected text")
    if content.strip():  # an answer may be empty
        text_cell(content, where)
    return {"role": text_cell(message["role"], f"{where}: role"), "content": content}


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ROLES = {
    "messages": SchemaField(
        "messages", messages_cell, MESSAGES, ("conversation", "conversations"), required=False
    ),
    "prompt": SchemaField("prompt", text_cell, pa.string(), ("instruction",), required=False),
    "completion": SchemaField("completion", optional_text_cell, pa.string(), ("response",), required=False),
    "text": SchemaField("text", text_cell, pa.string(), (), required=False),
}
FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The columns of each form; if a table has several forms, the first one is used."""


@dataclass(frozen=True)
class Conversations(Schema):
    """A schema whose rows have one of the `FORMS`; columns of other forms are ignored with a warning."""

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        form = _form(rows, data)
        others = [name for name in _ROLES if name not in form and name in rows.table.column_names]
        for name in others:
            diagnostics.warning(f"column {name!r} is not read: {' and '.join(form)} are", rows.name)
        roles = tuple(replace(_ROLES[name], required=True) for name in form)
        needed = replace(rows, table=rows.table.drop_columns(others)) if others else rows
        return Schema(roles).canonical(needed, data, diagnostics)


CONVERSATIONS = Conversations(tuple(_ROLES.values()))


def _form(rows: Rows, data: DataSection) -> Sequence[str]:
    """The columns of the rows' form: the form of which the job names a column, or the first complete one."""
    for form in FORMS:
        if any(chosen_name(data, name) for name in form):
            return form
    for form in FORMS:
        if all(_has(rows, _ROLES[name]) for name in form):
            return form
    raise DataError(
        f"{rows.name}: columns {rows.table.column_names},"
        " expected messages, or prompt and completion, or text"
    )


def _has(rows: Rows, role: SchemaField) -> bool:
    if rows.is_canonical:
        return role.name in rows.table.column_names
    return role_column(rows, role.name, None, (role.name, *role.usual), required=False) is not None


def form_of(dataset: Dataset) -> Sequence[str]:
    """The columns of the form of a data set that has been read."""
    return next(form for form in FORMS if form[0] in dataset.column_names)
