"""YAML as plain data: its version 1.2, in which `no` is a word and `1e-3` a number, and no references.

PyYAML reads version 1.1. Which plain words are numbers, truths or nothing follows the core schema of YAML
1.2.2, chapter 10.3.2. A key that comes twice is refused, and so are anchors and aliases: a few lines of them
can stand for more than fits into memory.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from atoll.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
"""By type: how a plain word of it is written, and its first characters."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads plain values and nothing that has a meaning beyond its own place."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - what PyYAML calls it

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node that stands for itself alone."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """A table, each key of which is text and comes once."""
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str" or key.value in seen:
                problem = f"the key {key.value!s:.80} comes twice or is no text"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        table: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return table

    def construct_integer(self, node: Any) -> int:
        """A whole number; one with zeros in front is decimal."""
        written = node.value
        return int(written, 0) if written[:2] in ("0x", "0o") else int(written, 10)


for _name, (_written, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_written})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """The table that is written as YAML; `origin` is what error messages call it.

    Raises:
        ConfigError: it is no YAML, or no table.
    """
    try:
        table = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{origin}: not valid YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{origin}: found YAML that is no table, expected a job's tables")
    return table
