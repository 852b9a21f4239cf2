"""A job's file: TOML as a table, and single keys of it overridden."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from atoll.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; every failure is one ConfigError line that names it."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: found a folder, expected a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a UTF-8 TOML file") from None
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty, expected TOML")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_override(table: dict[str, Any], override: str, *, option: str = "--set") -> None:
    """Set `a.b=value` in a parsed job; the value is TOML, or else a plain string.

    `option` is what the override was given with, for error messages.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{option} {override}: expected key=value, such as train.lr=0.05")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.strip()[:1] in ("{", "[", '"', "'"):
            raise ConfigError(
                f"{option} {override}: not valid TOML: {error}; put it in single quotes, for the shell"
            ) from None
        value = text
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{option} {override}: {part} is not a table")
        table = inner
    table[parts[-1]] = value
