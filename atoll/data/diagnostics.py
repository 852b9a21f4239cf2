"""What is wrong or remarkable in one shard, collected so that all of it can be told at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from atoll.errors import DataError


def shown(path: Path | str) -> str:
    """A name fit for one line of a message, whatever bytes it is made of."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open to be read; whatever the system says against it names the file."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        why = (error.strerror or type(error).__name__).lower()
        raise DataError(f"{shown(path)}: cannot be read: {why}; expected a readable file") from None


@dataclass
class Diagnostics:
    """The bad examples of a shard, one line each, and its remarks, counted by kind."""

    problems: list[str] = field(default_factory=list)
    _remarks: dict[str, list[str]] = field(default_factory=dict)

    def error(self, problem: DataError) -> None:
        self.problems.append(str(problem))

    def warning(self, what: str, where: str = "") -> None:
        self._remarks.setdefault(what, []).append(where)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(_note(what, places) for what, places in self._remarks.items())

    def close(self) -> None:
        """Raise the first problem, with the count of all, unless there is none."""
        if not self.problems:
            return
        count = len(self.problems)
        more = "" if count == 1 else f" (the first of {count} bad examples; `atoll check` lists them)"
        raise DataError(self.problems[0] + more)


def _note(what: str, places: list[str]) -> str:
    named = [place for place in places if place]
    if not named:
        return what
    return f"{what}: {named[0]}" + (f" and {len(named) - 1} more" if len(named) > 1 else "")
