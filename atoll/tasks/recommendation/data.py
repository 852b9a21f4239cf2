"""Building a history of items for each user, sorted by time, from a table of interactions.

The last item of each history is the one to predict: in the test part a user's last item, and in a client's
data the one before it (leave-one-out, as in Kang and McAuley 2018), so items to predict are never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from atoll.data.diagnostics import Counts, Diagnostics
from atoll.data.parsers import list_cell, name_cell, optional_text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.errors import DataError
from atoll.job.section import Count, Section
from atoll.tasks.moments import MomentReader, in_time

MIN_INTERACTIONS = 4
"""The shortest history that is used: two items to train on, one to validate on, one to test on."""


class RecommendOptions(Section):
    """`task.options` of recommendation: the length of histories, and the number `top` of recommended items.

    With `repeats`, items of the history may be recommended again. `texts` are the texts of the items in
    `data.classes`, in its order; by default those of the data.
    """

    length: Annotated[int, Field(ge=4, le=2_000)] = 50
    top: Count = 10
    repeats: bool = False
    texts: tuple[str, ...] | None = None


def events(time_format: str | None = None) -> Schema:
    """The schema of a table with one row per interaction; use a new one for each reading."""
    return Schema(
        (
            SchemaField(
                "user", name_cell, pa.string(), ("user_id", "userid", "customer", "customer_id", "session")
            ),
            SchemaField(
                "item", name_cell, pa.string(), ("item_id", "itemid", "product", "product_id", "sku")
            ),
            SchemaField(
                "time", MomentReader(time_format), pa.string(), ("timestamp", "date", "datetime", "ts")
            ),
            SchemaField(
                "item_text", optional_text_cell, pa.string(), ("title", "description", "name"), required=False
            ),
        ),
        count_by="user",
    )


_NAMES = list_cell(name_cell)
_TEXTS = list_cell(optional_text_cell)
HISTORIES = Schema(
    (
        SchemaField("user", name_cell, pa.string()),
        SchemaField("items", _NAMES, pa.list_(pa.string())),
        SchemaField("texts", _TEXTS, pa.list_(pa.string()), required=False),
    ),
)
"""The schema of a table with one row per user; `texts` has a text for each of `items`."""


def histories_of(
    table: pa.Table, length: int, origin: str, diagnostics: Diagnostics, *, hold_out: bool
) -> dict[str, pa.Table]:
    """Tables of histories for "train" and, with `hold_out`, "test", from a table of interactions.

    A history has at most `length` items, and after them the one to predict. Users and rows that are left out
    are counted in `diagnostics`. Columns that are constant for each user (a shop) are kept; rows of a user
    with equal times keep their order.

    Raises:
        DataError: no user has enough interactions.
    """
    rows = sorted(table.to_pylist(), key=lambda row: (row["user"], in_time(str(row["time"]))))
    users: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        users.setdefault(row["user"], []).append(row)
    histories = {user: events for user, events in users.items() if len(events) >= MIN_INTERACTIONS}
    if not histories:
        longest = max(map(len, users.values()), default=0)
        raise DataError(
            f"{origin}: at most {longest} rows a user, expected a user with {MIN_INTERACTIONS} or more"
        )
    _count(users, histories, length + (2 if hold_out else 1), diagnostics)
    rest = [name for name in table.column_names if name not in ("user", "item", "time", "item_text")]
    constant = [
        name for name in rest if all(len({e[name] for e in events}) == 1 for events in histories.values())
    ]
    has_texts = "item_text" in table.column_names
    seen = {"train": slice(-length - 2, -1), "test": slice(-length - 1, None)}
    if not hold_out:
        seen = {"train": slice(-length - 1, None)}
    return {split: _rows(histories, part, constant, has_texts) for split, part in seen.items()}


def _count(
    users: Mapping[str, Sequence[Any]],
    histories: Mapping[str, Sequence[Any]],
    most: int,
    diagnostics: Diagnostics,
) -> None:
    """Count used and unused users and rows in `diagnostics`; of each user the last `most` rows are used."""
    few, used = (
        f"with fewer than {MIN_INTERACTIONS} rows",
        sum(min(len(rows), most) for rows in histories.values()),
    )
    whole = sum(map(len, histories.values()))
    diagnostics.leave_out(f"of users {few}", sum(map(len, users.values())) - whole)
    diagnostics.leave_out(f"before the last {most} of their user", whole - used)
    diagnostics.use_rows(used)
    lost = {few: len(users) - len(histories)} if len(histories) < len(users) else {}
    diagnostics.counts.append(Counts("users", len(users), len(histories), lost))


def _rows(
    users: dict[str, list[dict[str, Any]]], part: slice, constant: list[str], has_texts: bool
) -> pa.Table:
    columns: dict[str, list[Any]] = {"user": list(users)}
    columns["items"] = [[event["item"] for event in events[part]] for events in users.values()]
    if has_texts:
        columns["texts"] = [[event["item_text"] for event in events[part]] for events in users.values()]
    for name in constant:
        columns[name] = [events[0][name] for events in users.values()]
    kinds = {role.name: role.kind for role in HISTORIES.roles}
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})
