"""Reading job files: TOML or YAML as a table, overriding single keys, and making paths absolute."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from atoll.job.job import Job


LARGEST = 64 * 2**20
"""The most bytes of a job file; a million class names take 14 MiB."""
YAML = (".yaml", ".yml")
ENDINGS = (".toml", *YAML)


def read_job(path: Path) -> dict[str, Any]:
    """Parse a job file as a table: YAML if its suffix says so, else TOML.

    Raises:
        ConfigError: the file can't be read or parsed; one line that names it.
    """
    if path.suffix.lower() not in YAML:
        return read_toml(path)
    from atoll.system.yaml_text import parse_yaml  # imports PyYAML, which most jobs don't need

    return parse_yaml(_text(path, "YAML"), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file as a table.

    Raises:
        ConfigError: the file can't be read or parsed; one line that names it.
    """
    text = _text(path, "TOML")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None


def _nearby(path: Path) -> str:
    """The end of a line about a file that isn't there: a job beside it that must be meant, if one is."""
    there = sorted(other.name for ending in ENDINGS for other in path.parent.glob(f"*{ending}"))
    nothing = "nothing near"
    lines = (did_you_mean(name, there, otherwise=nothing) for name in (path.name, f"{path.name}.toml"))
    return next((f", {line}" for line in lines if line != nothing), "")


def _text(path: Path, kind: str) -> str:
    """The content of a regular file of at most `LARGEST` bytes; a FIFO or a device is never opened."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{path}: found a folder, expected a {kind} file")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: found no regular file, expected a {kind} file")
        if status.st_size > LARGEST:
            raise ConfigError(
                f"{path}: found {status.st_size:,} bytes, expected a {kind} file of at most {LARGEST:,}"
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearby(path)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a UTF-8 {kind} file") from None
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty, expected {kind}")
    return text


def apply_override(table: dict[str, Any], override: str, *, option: str = "--set") -> None:
    """Set a key of a parsed job from a text such as `train.lr=0.05`; the value is TOML, or else a string.

    `option` is the command-line option of the override, for error messages.

    Raises:
        ConfigError: the text is no `key=value`, or a part of the key is no table.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{option} {override}: expected key=value, such as train.lr=0.05")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
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


def with_absolute_paths(job: Job, folder: Path, origin: str) -> Job:
    """The job with absolute paths, so that it runs from anywhere; relative ones are resolved in `folder`."""
    data = job.data.model_copy(
        update={
            "source": _absolute(_if_beside(job.data.source, folder), folder, origin, "data.source"),
            "test": job.data.test
            and _absolute(_if_beside(job.data.test, folder), folder, origin, "data.test"),
        }
    )
    backbone = job.backbone.model_copy(
        update={
            "name": _absolute(job.backbone.name, folder, origin, "backbone.name"),
            "weights": _absolute(job.backbone.weights, folder, origin, "backbone.weights"),
        }
    )
    devices = job.federation.devices
    if devices is not None:
        devices = _absolute(_as_path(devices), folder, origin, "federation.devices")
    federation = job.federation.model_copy(update={"devices": devices})
    changed: dict[str, Any] = {"data": data, "backbone": backbone, "federation": federation}
    if job.train.teacher is not None:
        teacher = _absolute(_as_path(job.train.teacher), folder, origin, "train.teacher")
        changed["train"] = job.train.model_copy(update={"teacher": teacher})
    return job.model_copy(update=changed)


def _if_beside(value: str, folder: Path) -> str:
    """The value as a path if it names a file beside the job, such as `power.csv`.

    Names of built-in sources contain no dot.
    """
    is_name = "." in value.strip(".") and not set(value) & set("/:$~\0")
    return f"./{value}" if is_name and (folder / value).exists() else value


def _as_path(value: str) -> str:
    """A value that must be a path, with `./` in front if it doesn't look like one."""
    return value if "/" in value or value.startswith("~") else f"./{value}"


def _absolute(value: str, folder: Path, origin: str, key: str) -> str:
    """The value made absolute if it looks like a path: it contains a slash, or begins with `~` or a dot."""
    if "$" in value:
        raise ConfigError(f"{origin}: {key}: environment variables are not expanded, found {value!r}")
    if ":" in value.split("/")[0] or not (value.startswith((".", "~")) or "/" in value):
        return value
    if "\0" in value:
        raise ConfigError(f"{origin}: {key}: NUL cannot be part of a path, found {value!r}")
    return os.path.realpath(folder / os.path.expanduser(value))  # noqa: PTH111 - these raise at nothing
