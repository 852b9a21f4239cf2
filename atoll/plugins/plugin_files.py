"""Plugin files: Python files that are imported before a job is read, so that their decorators register."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from atoll.errors import ConfigError, InputError
from atoll.plugins.registry import failure_of, in_one_line, origin_is


@dataclass(frozen=True)
class PluginFile:
    """A Python file that was loaded as a plugin: its absolute path and its hash."""

    file: str
    sha256: str


_files: dict[Path, PluginFile] = {}


def load_file(path: str | Path) -> PluginFile:
    """Import one Python file, whose decorators then register; loading the same content again does nothing.

    Raises:
        ConfigError: there is no such file, it raises an error, or it registers a name that is taken.
    """
    file = Path(path).resolve()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--plugin {path}: cannot be read ({error.strerror}), expected a Python file"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if file in _files and _files[file].sha256 == digest:
        return _files[file]
    with origin_is(str(file)):
        _execute(file, content, digest, str(path))
    _files[file] = PluginFile(str(file), digest)
    return _files[file]


def load_files(paths: Iterable[str | Path]) -> None:
    """Load each file in order, as `load_file` does.

    Raises:
        ConfigError: as `load_file`.
    """
    for path in paths:
        load_file(path)


def files() -> list[PluginFile]:
    """The plugin files that were loaded, in order."""
    return list(_files.values())


def _execute(file: Path, content: bytes, digest: str, argument: str) -> None:
    """Execute a file's content as a module, under a name that no installed module has.

    Python's import could take the file's compiled form of before: it tells a change by size and second only,
    and results would be kept under the hash of code that hasn't computed them.

    Raises:
        ConfigError: it isn't Python, or raises an error.
    """
    name = f"atoll_plugin_{file.stem}_{digest[:8]}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {argument}: expected a Python file, whose name ends in .py")
    module = module_from_spec(spec)
    sys.modules[name] = module
    failure = failure_of(lambda: exec(compile(content, str(file), "exec", dont_inherit=True), vars(module)))
    if failure is None:
        return
    del sys.modules[name]
    if isinstance(failure, InputError):
        raise ConfigError(f"--plugin {argument}: {failure}")
    raise ConfigError(f"--plugin {argument}{_line_in(failure, file)}: {in_one_line(failure)}") from failure


def _line_in(error: Exception, file: Path) -> str:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""
