"""Converting pydantic's validation errors into one readable line."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from atoll.errors import did_you_mean
from atoll.job.section import KeyConflict


def explain(error: ValidationError, model: type[BaseModel], origin: str, *, joined_by: str = ": ") -> str:
    """One line: the origin, then key, found and expected value of up to three errors, and how many more.

    `origin` is a file's name, or, with `joined_by="."`, a table's key: `strategy.options.mu: …`.
    """
    findings = error.errors(include_url=False)
    lines = [_finding(finding, model) for finding in findings[:3]]
    more = f" (and {len(findings) - 3} more)" if len(findings) > 3 else ""
    if joined_by == "." and not findings[0]["loc"]:  # of the table as a whole
        joined_by = ": "
    return origin + joined_by + "; ".join(lines) + more


def _finding(finding: Any, model: type[BaseModel]) -> str:
    key = _key(finding["loc"])
    text = _short(finding["input"])
    match finding["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest(finding['loc'], model)}"
        case "missing":
            return f"{key}: missing, expected a value"
        case "value_error" if key and isinstance(finding["ctx"]["error"], KeyConflict):
            return f"{key}.{finding['ctx']['error']}"
        case "value_error":
            return f"{key}: {finding['ctx']['error']}" if key else str(finding["ctx"]["error"])
        case "union_tag_not_found":
            return f"{key}: the key kind is missing, expected one of {', '.join(map(repr, KINDS))}"
        case "union_tag_invalid":
            tags, tag = finding["ctx"]["expected_tags"], finding["ctx"]["tag"]
            return f"{key}.kind: expected one of {tags}, found {tag!r}"
        case "too_short":
            return f"{key}: expected at least {finding['ctx']['min_length']}, found {text}"
        case "string_pattern_mismatch":
            return f"{key}: expected a match of {finding['ctx']['pattern']}, found {text}"
    expected = finding["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: expected {expected}, found {text}"


KINDS = ("iid", "dirichlet", "pathological", "natural", "resampled")
"""The tags of `data.partition`, the only tagged union in a job."""

OTHER = "other partition"
"""The tag of an extension's partition."""


def _key(loc: tuple[Any, ...]) -> str:
    """The dotted key as the user wrote it, without pydantic's union tags."""
    return ".".join(str(part) for part in loc if part not in (*KINDS, OTHER))


def _nearest(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    known, key = _fields_at(model, loc[:-1]), str(loc[-1])
    elsewhere = [f"{name}.{key}" for name in model.model_fields if key in _fields_at(model, (name,))]
    there = f"did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere and len(loc) == 1 else None
    return f", {did_you_mean(key, sorted(known), cutoff=0.5, otherwise=there)}"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The valid keys of the table at `path`."""
    for part in path:
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        parts = [getattr(a, "__origin__", a) for a in get_args(annotation)]  # of a union, without their tags
        candidates = [a for a in (annotation, *parts) if isinstance(a, type)]
        models = [a for a in candidates if issubclass(a, BaseModel)]
        tag = path[path.index(part) + 1] if path.index(part) + 1 < len(path) else None
        tagged = [m for m in models if tag is not None and m.__name__.lower() == tag]
        model = (tagged or models or [model])[0]
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
