"""What keys of a job need of one another: the rules themselves, and those that jobs' tables declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from atoll.job.error_text import explain
from atoll.job.job import Job
from atoll.job.section import Excludes, KeyConflict, Needs, Section, check_keys


class Inner(Section):
    kind: Literal["a", "b", "c"] | None = None
    size: Annotated[int | None, Needs("kind", ("a", "b"))] = None
    any_kind: Annotated[bool, Needs("kind", why="which is what it turns", otherwise="say 'c'")] = False
    speed: Annotated[float, Needs("outer.mode", ("fast",))] = 1.0
    slow: Annotated[bool, Excludes("speed", "for one says the other")] = False


class Outer(Section):
    mode: Literal["fast", "slow"] = "slow"
    shy: Annotated[bool, Excludes("inner.kind", "for it tells", ("c",))] = False


class Whole(Section):
    inner: Inner = Inner()
    outer: Outer = Outer()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, None),
        ({"inner": {"kind": "a", "size": 3, "any_kind": True}}, None),
        ({"inner": {"size": 3}}, "inner.size has no meaning without kind = 'a' or 'b': remove it"),
        ({"inner": {"kind": "c", "size": 3}},
         "inner.size has no meaning with kind = 'c', only with 'a' or 'b': remove it"),
        ({"inner": {"any_kind": True}},
         "inner.any_kind has no meaning without kind, which is what it turns: remove it, or say 'c'"),
        ({"inner": {"speed": 2.0}},
         "inner.speed has no meaning with outer.mode = 'slow', only with 'fast': remove it"),
        ({"inner": {"speed": 2.0}, "outer": {"mode": "fast"}}, None),
        ({"inner": {"speed": 2.0, "slow": True}, "outer": {"mode": "fast"}},
         "inner.slow and speed exclude each other, for one says the other: keep one"),
        ({"inner": {"kind": "c"}, "outer": {"shy": True}},
         "outer.shy: for it tells; expected none with inner.kind = 'c'"),
        ({"inner": {"kind": "b"}, "outer": {"shy": True}}, None),
    ],
)  # fmt: skip
def test_a_key_is_held_against_the_others(given: dict[str, Any], line: str | None) -> None:
    if line is None:
        Whole.model_validate(given)
        return
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(given)
    assert explain(caught.value, Whole, "job.toml") == f"job.toml: {line}"


def test_a_rule_of_another_table_waits_for_the_whole() -> None:
    lone = Inner(speed=2.0)
    assert lone.is_given("speed") and not lone.is_given("kind")
    with pytest.raises(KeyConflict, match=r"^inner\.speed has no meaning"):
        check_keys(Whole.model_construct(inner=lone, outer=Outer()))


def tables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The job's tables by name."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def declared() -> list[tuple[str, str, Needs | Excludes]]:
    return [
        (name, key, rule)
        for name, table in tables(Job)
        for key, field in table.model_fields.items()
        for rule in field.metadata
        if isinstance(rule, Needs | Excludes)
    ]


def test_every_rule_of_a_job_names_a_key_that_is_there_and_values_that_it_can_have() -> None:
    found = declared()
    assert len(found) > 45
    known = dict(tables(Job))
    for name, key, rule in found:
        *above, other = rule.key.split(".")
        table = known[above[0] if above else name]
        assert other in table.model_fields and (above, other) != ([], key), (name, key, rule.key)
        words = str(table.model_fields[other].annotation)
        assert all(repr(value) in words for value in rule.values), (name, key, rule)
