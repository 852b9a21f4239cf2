"""Turn pydantic's findings into the one line a person reads."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """One line: file, key, what was found, what was expected; then how many more there are."""
    findings = error.errors(include_url=False)
    lines = [_finding(finding, model) for finding in findings[:3]]
    more = f" (and {len(findings) - 3} more)" if len(findings) > 3 else ""
    return f"{origin}: " + "; ".join(lines) + more


def _finding(finding: Any, model: type[BaseModel]) -> str:
    key = _key(finding["loc"])
    found = _short(finding["input"])
    match finding["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest(finding['loc'], model)}"
        case "missing":
            return f"{key}: missing, expected a value"
        case "value_error":
            return f"{key}: {finding['ctx']['error']}" if key else str(finding["ctx"]["error"])
        case "union_tag_not_found":
            return f"{key}: the key kind is missing, expected one of {', '.join(map(repr, KINDS))}"
        case "union_tag_invalid":
            tags, tag = finding["ctx"]["expected_tags"], finding["ctx"]["tag"]
            return f"{key}.kind: expected one of {tags}, found {tag!r}"
        case "too_short":
            return f"{key}: expected at least {finding['ctx']['min_length']}, found {found}"
        case "string_pattern_mismatch":
            return f"{key}: expected a match of {finding['ctx']['pattern']}, found {found}"
    expected = finding["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: expected {expected}, found {found}"


KINDS = ("iid", "dirichlet", "pathological", "natural")
"""Tags of the one tagged union there is, `data.partition`."""


def _key(loc: tuple[Any, ...]) -> str:
    """The dotted key as the user wrote it: a union's tag is no part of it."""
    return ".".join(str(part) for part in loc if part not in KINDS)


def _nearest(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    known, key = _fields_at(model, loc[:-1]), str(loc[-1])
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f", did you mean {close[0]!r}?"
    elsewhere = [f"{name}.{key}" for name in model.model_fields if key in _fields_at(model, (name,))]
    if elsewhere and len(loc) == 1:
        return f", did you mean {' or '.join(map(repr, elsewhere))}?"
    return f", expected one of {', '.join(sorted(known))}"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys allowed in the table at `path`."""
    for part in path:
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        models = [a for a in candidates if issubclass(a, BaseModel)]
        tag = path[path.index(part) + 1] if path.index(part) + 1 < len(path) else None
        tagged = [m for m in models if tag is not None and m.__name__.lower() == tag]
        model = (tagged or models or [model])[0]
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
