"""The base class of a job's tables, and declarations of which keys require or exclude each other.

A key that is only valid together with another declares so in its type:

    lr_step: Annotated[Count | None, Needs("lr_schedule", ("step",))] = None

`check_keys` checks these declarations for each table and for the whole job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Between = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Options = dict[str, bool | int | float | str | tuple[bool | int | float | str, ...]]
"""Settings of a named task, network or extension, which validates them itself."""


@dataclass(frozen=True)
class Needs:
    """Declares that a key is only valid if another key is set, or has one of these values.

    `key` is in the same table (`"lr_schedule"`) or in another (`"tune.method"`). For the error message, `why`
    gives a reason, and `otherwise` an alternative to removing the key.
    """

    key: str
    values: tuple[Any, ...] = ()
    why: str = ""
    otherwise: str = ""

    def is_met(self, value: Any, is_given: bool) -> bool:
        """Whether the requirement is met by the other key's value, or by its being set."""
        return value in self.values if self.values else is_given

    def broken(self, key: str, section: Section) -> str | None:
        """The error message in one line if `key`, which is set, violates the rule; else None."""
        value, is_given = _looked_up(section, self.key)
        if self.is_met(value, is_given):
            return None
        because, instead = self.why and f", {self.why}", self.otherwise and f", or {self.otherwise}"
        expected = " or ".join(map(repr, self.values))
        if value:
            with_this = f"with {self.key} = {value!r}" + (f", only with {expected}" if expected else "")
        else:
            with_this = f"without {self.key}" + (f" = {expected}" if expected else "")
        return f"{key} has no meaning {with_this}{because}: remove it{instead}"


@dataclass(frozen=True)
class Excludes:
    """Declares that a key is invalid if another key is set, or has one of these values; `why` is the reason.

    `key` is in the same table or in another (`"privacy.unit"`).
    """

    key: str
    why: str
    values: tuple[Any, ...] = ()

    def broken(self, key: str, section: Section) -> str | None:
        """The error message in one line if `key`, which is set, violates the rule; else None."""
        value, is_given = _looked_up(section, self.key)
        if not (value in self.values if self.values else is_given):
            return None
        if not self.values:
            return f"{key} and {self.key} exclude each other, {self.why}: keep one"
        return f"{key}: {self.why}; expected none with {self.key} = {value!r}"


class KeyConflict(ValueError):
    """A key is invalid together with another one; the message begins with its name in the table."""


class Section(BaseModel):
    """A table of a job: frozen, with strict types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        check_keys(self)
        return self

    def is_given(self, key: str) -> bool:
        """Whether a key has another value than its default; always true of a required key."""
        return bool(getattr(self, key) != _default(type(self), key))


@lru_cache(maxsize=2048)
def _default(table: type[Section], key: str) -> Any:
    """A key's default, to compare with; of a required key something that equals no value."""
    return table.model_fields[key].get_default(call_default_factory=True)


def check_keys(section: Section) -> None:
    """Check the `Needs` and `Excludes` of a table's keys, and, for a job, those between its tables.

    Raises:
        KeyConflict: a key violates a rule; one line that names it.
    """
    for table, name in _tables(section):
        for key, rule in _rules(type(table), of_one_table=table is section):
            if table.is_given(key):
                line = rule.broken(f"{name}{key}", section)
                if line is not None:
                    raise KeyConflict(line)


def _tables(section: Section) -> Iterator[tuple[Section, str]]:
    """(table, prefix of its keys): the table itself with "", and its direct subtables."""
    yield section, ""
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield inner, f"{name}."


@lru_cache(maxsize=256)
def _rules(table: type[Section], *, of_one_table: bool) -> tuple[tuple[str, Needs | Excludes], ...]:
    """(key, rule) for each `Needs` and `Excludes` of a table, in the order of declaration.

    They are those that name a key of the same table, or else those that name one of another table.
    """
    return tuple(
        (key, rule)
        for key, field in table.model_fields.items()
        for rule in field.metadata
        if isinstance(rule, Needs | Excludes) and ("." not in rule.key) == of_one_table
    )


def _looked_up(section: Section, path: str) -> tuple[Any, bool]:
    """(a key's value, whether it is set); `path` is its name in the table, or its dotted name in the job."""
    *tables, key = path.split(".")
    for name in tables:
        section = getattr(section, name)
    return getattr(section, key), section.is_given(key)


@lru_cache(maxsize=1024)
def needs_of(job: type[Section], path: str) -> tuple[Needs, ...]:
    """The `Needs` of a job's key, with dotted names of the keys that they name; empty for an unknown key.

    `path` is the key's dotted name (`"train.momentum"`).
    """
    table, key = _table_of(job, path)
    if table is None:
        return ()
    before = path.removesuffix(key)
    return tuple(
        rule if "." in rule.key else replace(rule, key=f"{before}{rule.key}")
        for name, rule in _rules(table, of_one_table=True) + _rules(table, of_one_table=False)
        if name == key and isinstance(rule, Needs)
    )


def default_of(job: type[Section], path: str) -> Any:
    """The default value of a job's key; None if the key is required or unknown."""
    table, key = _table_of(job, path)
    if table is None or key not in table.model_fields or table.model_fields[key].is_required():
        return None
    return _default(table, key)


@lru_cache(maxsize=1024)
def _table_of(job: type[Section], path: str) -> tuple[type[Section] | None, str]:
    """(the table that contains a key, the key's name there); (None, name) if there is no such table."""
    *tables, key = path.split(".")
    for name in tables:
        field = job.model_fields.get(name)
        kind = None if field is None else field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None, key
        job = kind
    return job, key
