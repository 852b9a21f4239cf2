"""Data of preferences: `prompt`, `chosen` and `rejected`, as texts or as messages (TRL's formats)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from atoll.data.columns import values_of
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics
from atoll.data.parsers import optional_text_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.tables import Rows
from atoll.job.job import DataSection
from atoll.tasks.language_modeling.data import MESSAGES, messages_cell, turns_cell

_ROLES = {
    "prompt": SchemaField("prompt", text_cell, pa.string(), ("instruction",), required=False),
    "chosen": SchemaField("chosen", optional_text_cell, pa.string(), ("preferred",)),
    "rejected": SchemaField("rejected", optional_text_cell, pa.string(), ("dispreferred",)),
}
_OF_MESSAGES: dict[str, Callable[[Any, str], Any]] = {
    "prompt": turns_cell,
    "chosen": messages_cell,
    "rejected": messages_cell,
}


@dataclass(frozen=True)
class Preferences(Schema):
    """A schema of preferences: if `chosen` holds messages, all columns are read as such, else as texts."""

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        name = self._column(rows, _ROLES["chosen"], data)
        if not _holds_messages(rows, str(name)):
            return super().canonical(rows, data, diagnostics)
        roles = tuple(replace(role, read=_OF_MESSAGES[role.name], kind=MESSAGES) for role in self.roles)
        return Schema(roles).canonical(rows, data, diagnostics)


def _holds_messages(rows: Rows, column: str) -> bool:
    """Whether the first non-empty cell is a list of messages, or JSON text of one."""
    first = next((cell for cell in values_of(rows, column).to_pylist() if cell), None)
    if not isinstance(first, str):
        return isinstance(first, list)
    try:
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value)


def _prefer_nothing(dataset: Dataset) -> str | None:
    """A remark on pairs with equal completions: they have no gradient, and count as wrong."""
    pairs = zip(dataset.cells("chosen"), dataset.cells("rejected"), strict=True)
    count = sum(chosen == rejected for chosen, rejected in pairs)
    return (
        f"{count} of {len(dataset)} pairs prefer nothing, chosen and rejected are the same" if count else None
    )


PREFERENCES = Preferences(tuple(_ROLES.values()), odd=_prefer_nothing)
