"""What every table of a job is made of, and what its keys need of one another.

A key that means something only beside another says so where it is declared:

    lr_step: Annotated[Count | None, Needs("lr_schedule", ("step",))] = None

and `check_keys` holds every table and the whole job against what their keys say.
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
"""Settings that only the named task, network or extension knows; whoever knows them checks them."""


@dataclass(frozen=True)
class Needs:
    """A key has a meaning only where another is given, or has one of these values.

    `key` is one of the same table (`"lr_schedule"`), or of another (`"tune.method"`). `why` says it where
    the two names don't; `otherwise` what to do but to remove it.
    """

    key: str
    values: tuple[Any, ...] = ()
    why: str = ""
    otherwise: str = ""

    def is_met(self, value: Any, is_given: bool) -> bool:
        """Whether the other key, which is `value` or left at its default, is as this one needs it."""
        return value in self.values if self.values else is_given

    def broken(self, key: str, section: Section) -> str | None:
        """What is wrong with that key, which is given, in one line; None where nothing is."""
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
    """A key can't go with another, or with these of its values; `why` says the reason.

    `key` is one of the same table, or of another (`"privacy.unit"`).
    """

    key: str
    why: str
    values: tuple[Any, ...] = ()

    def broken(self, key: str, section: Section) -> str | None:
        """What is wrong with that key, which is given, in one line; None where nothing is."""
        value, is_given = _looked_up(section, self.key)
        if not (value in self.values if self.values else is_given):
            return None
        if not self.values:
            return f"{key} and {self.key} exclude each other, {self.why}: keep one"
        return f"{key}: {self.why}; expected none with {self.key} = {value!r}"


class KeyConflict(ValueError):
    """A key can't be as it is, beside the others; the line begins with its name in the table."""


class Section(BaseModel):
    """A table of the job: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        check_keys(self)
        return self

    def is_given(self, key: str) -> bool:
        """Whether a key has another value than its default; one that must be given always is."""
        field = type(self).model_fields[key]
        return bool(getattr(self, key) != field.get_default(call_default_factory=True))


def check_keys(section: Section) -> None:
    """Hold a table's keys against what they need and exclude; and, in a job, those of all its tables.

    Raises:
        KeyConflict: one can't be as it is, beside the others; one line that names it.
    """
    for table, name in _tables(section):
        for key, rule in _rules(type(table)):
            is_of_one_table = "." not in rule.key
            if is_of_one_table == (table is section) and table.is_given(key):
                line = rule.broken(f"{name}{key}", table if is_of_one_table else section)
                if line is not None:
                    raise KeyConflict(line)


def _tables(section: Section) -> Iterator[tuple[Section, str]]:
    """The table itself, and those right below it with what stands before their keys."""
    yield section, ""
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield inner, f"{name}."


@lru_cache(maxsize=256)
def _rules(table: type[Section]) -> tuple[tuple[str, Needs | Excludes], ...]:
    """(key, what it needs or excludes) of a table, in the order in which they are declared."""
    return tuple(
        (key, rule)
        for key, field in table.model_fields.items()
        for rule in field.metadata
        if isinstance(rule, Needs | Excludes)
    )


def _looked_up(section: Section, path: str) -> tuple[Any, bool]:
    """(a key's value, whether it is given) by its name in the table, or from the whole job down."""
    *tables, key = path.split(".")
    for name in tables:
        section = getattr(section, name)
    return getattr(section, key), section.is_given(key)


@lru_cache(maxsize=1024)
def needs_of(job: type[Section], path: str) -> tuple[Needs, ...]:
    """What a key of a job needs, by the names that the job's file has for both.

    `path` is the key's (`"train.momentum"`); of a key that there isn't, nothing is known and nothing needed.
    """
    table, key = _table_of(job, path)
    if table is None:
        return ()
    before = path.removesuffix(key)
    return tuple(
        rule if "." in rule.key else replace(rule, key=f"{before}{rule.key}")
        for name, rule in _rules(table)
        if name == key and isinstance(rule, Needs)
    )


def default_of(job: type[Section], path: str) -> Any:
    """What a key is where a job doesn't say it; None where that must be said, or there is no such key."""
    table, key = _table_of(job, path)
    field = None if table is None else table.model_fields.get(key)
    if field is None or field.is_required():
        return None
    return field.get_default(call_default_factory=True)


@lru_cache(maxsize=1024)
def _table_of(job: type[Section], path: str) -> tuple[type[Section] | None, str]:
    """(the table that a key is in, its name there); no table where there is none of that name."""
    *tables, key = path.split(".")
    for name in tables:
        field = job.model_fields.get(name)
        kind = None if field is None else field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None, key
        job = kind
    return job, key
