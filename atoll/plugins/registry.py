"""All extensions by kind and name, whether decorators registered them or entry points list them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from atoll.errors import ConfigError, InputError, did_you_mean
from atoll.plugins.code import Code, code_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pydantic import BaseModel

GROUPS = {
    "strategy": "atoll.strategies",
    "task": "atoll.tasks",
    "partition": "atoll.partitions",
    "metric": "atoll.metrics",
    "source": "atoll.sources",
    "backbone": "atoll.backbones",
    "augmentation": "atoll.augmentations",
}
"""The kinds of extensions, and the entry-point group in which installed packages list each kind."""

WITH_CODE = ("backbone", "augmentation")
"""Kinds whose code is hashed: their results are cached, and another version may compute other results."""

BACKBONE_PREFIX = "plugin:"
"""The prefix of an extension's backbone in `backbone.name`."""

BUILT_IN = "atoll"
"""The origin of everything that comes with Atoll."""

Thing = TypeVar("Thing", bound=Callable[..., Any])
E = TypeVar("E")


@dataclass(frozen=True)
class Extension:
    """One strategy, task, partition or the like that other people's code brings."""

    kind: str
    """strategy, task, partition, metric, source, backbone or augmentation."""
    name: str
    """What jobs call it."""
    summary: str
    """One line for `atoll list`."""
    origin: str
    """Who brings it: a distribution and its version, or a Python file."""
    place: str
    """`module:attribute` of its definition."""
    thing: Callable[..., Any] | None = None
    """The class or function; None until its package is imported."""
    options: type[BaseModel] | None = None
    """The pydantic model that checks the job's options for it."""
    entry: EntryPoint | None = None
    of: str = "images"
    """For an augmentation, the inputs it varies: images or texts."""
    code: Code | None = None
    """The hashes of its code when it was imported, for kinds in `WITH_CODE`; None where no file holds it."""

    def loaded(self) -> Extension:
        """The same extension with its `thing`, whose package is imported at the first use.

        Raises:
            ConfigError: its package can't be imported.
        """
        if self.thing is not None:
            return self
        assert self.entry is not None
        thing = _imported(self.entry, self.origin)
        declared = _brought[self.kind].get(self.name)
        if declared is None or declared.thing is None:  # the package has no decorator
            options = getattr(thing, "Options", None)
            code = code_of(thing.__module__) if self.kind in WITH_CODE else None
            declared = replace(self, thing=thing, options=options, code=code)
        _brought[self.kind][self.name] = replace(declared, origin=self.origin, entry=self.entry)
        return _brought[self.kind][self.name]


_brought: dict[str, dict[str, Extension]] = {kind: {} for kind in GROUPS}
_registries: dict[str, Registry[Any]] = {}
_origins: list[str] = []
"""The origins of the modules that are being imported at the moment, the innermost last."""
_searched: set[str] = set()
"""Kinds whose entry points have been looked up."""


class Registry(Mapping[str, E], Generic[E]):
    """All entries of one kind by name: Atoll's own (`built_in`) and those of extensions.

    `of` turns an extension into an entry without importing it. Entry points are looked up at the first
    unknown name: iterating lists what is known until then, `everything` looks them up first.

    Raises:
        ConfigError: an extension has the name of one of Atoll's own.
    """

    def __init__(self, kind: str, built_in: Mapping[str, E], of: Callable[[Extension], E]) -> None:
        self.kind, self._built_in, self._of = kind, dict(built_in), of
        _registries[kind] = self
        for extension in _brought[kind].values():
            _check_new(extension)

    def __getitem__(self, name: str) -> E:
        if name in self._built_in:
            return self._built_in[name]
        return self._of(brought(self.kind, name))

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from _brought[self.kind]

    def __len__(self) -> int:
        return len(self._built_in) + len(_brought[self.kind])

    def has(self, name: str) -> bool:
        """Whether Atoll itself has an entry of this name."""
        return name in self._built_in

    def everything(self) -> dict[str, E]:
        """Every entry by name, installed packages' included; no package is imported for it."""
        _search(self.kind)
        return {name: self[name] for name in self}

    def origin(self, name: str) -> str:
        """Where an entry comes from: atoll, a distribution with its version, or a plugin's file."""
        return BUILT_IN if self.has(name) else brought(self.kind, name).origin

    def check(self, name: str, key: str, more: str = "") -> None:
        """Raises ConfigError, in one line with the nearest name, if there is no entry `name`.

        `key` is the job's key that names it; `more` is added after the known names.
        """
        if name not in self:
            raise ConfigError(f"{key}: unknown {self.kind} {name!r}, {did_you_mean(name, self)}{more}")


def brought(kind: str, name: str) -> Extension:
    """The extension of this kind and name; its package may not be imported yet.

    Raises:
        KeyError: no extension has this name.
    """
    if name not in _brought[kind]:
        _search(kind)
    return _brought[kind][name]


class origin_is:
    """Within the block, extensions that are registered get this origin."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def __enter__(self) -> None:
        _origins.append(self._origin)

    def __exit__(self, *_: object) -> None:
        _origins.pop()


def registering(
    kind: str, name: str, summary: str, options: type[BaseModel] | None = None, *, of: str = "images"
) -> Callable[[Thing], Thing]:
    """A decorator that registers the class or function that it decorates.

    Raises:
        ConfigError: the name is taken.
    """

    def register(thing: Thing) -> Thing:
        place = f"{thing.__module__}:{thing.__qualname__}"
        origin = _origins[-1] if _origins else _file_of(thing.__module__)
        line = summary or (thing.__doc__ or "").strip().partition("\n")[0]
        model = options or getattr(thing, "Options", None)
        code = code_of(thing.__module__) if kind in WITH_CODE else None
        _add(Extension(kind, name, line, origin, place, thing, model, of=of, code=code))
        return thing

    return register


def _file_of(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__file__", None) or module)


def _add(new: Extension) -> None:
    """Register an extension; one may replace itself, as when a notebook's cell is run again.

    Raises:
        ConfigError: another thing has the name.
    """
    _check_new(new)
    known = _brought[new.kind].get(new.name)
    if known is not None and known.entry is not None:
        new = replace(new, origin=known.origin, entry=known.entry)
    _brought[new.kind][new.name] = new


def _check_new(new: Extension) -> None:
    registry = _registries.get(new.kind)
    if registry is not None and registry.has(new.name):
        raise ConfigError(_twice(new.kind, new.name, BUILT_IN, new.origin))
    known = _brought[new.kind].get(new.name)
    if known is not None and not _is_same(known, new):
        places = [f"{one.origin} ({one.place})" for one in (known, new)]
        raise ConfigError(_twice(new.kind, new.name, *places))


def _is_same(known: Extension, new: Extension) -> bool:
    """Whether both are one extension: an entry point may name it by another module of the same package."""
    if known.place == new.place:
        return True
    packages = {one.place.partition(":")[0].partition(".")[0] for one in (known, new)}
    return (known.entry is not None) != (new.entry is not None) and len(packages) == 1


def _twice(kind: str, name: str, one: str, other: str) -> str:
    return f"{kind} {name!r} is registered twice: by {one} and by {other}; expected two different names"


def _search(kind: str) -> None:
    """Look up the entry points of a kind, once per process."""
    if kind in _searched:
        return
    from importlib.metadata import entry_points  # every command imports this file, and few ask for more names

    for entry in entry_points(group=GROUPS[kind]):
        dist = entry.dist
        origin = "?" if dist is None else f"{dist.name} {dist.version}"
        summary = dist.metadata["Summary"] if dist is not None and "Summary" in dist.metadata else ""
        _add_entry(Extension(kind, entry.name, summary, origin, entry.value, entry=entry))
    _searched.add(kind)


def _add_entry(new: Extension) -> None:
    """Register an entry point; if its module is imported already, complete what its decorator registered."""
    _check_new(new)
    known = _brought[new.kind].get(new.name)
    _brought[new.kind][new.name] = (
        new if known is None else replace(known, origin=new.origin, entry=new.entry)
    )


def _imported(entry: EntryPoint, origin: str) -> Callable[..., Any]:
    loaded: list[Callable[..., Any]] = []
    with origin_is(origin):
        failure = failure_of(lambda: loaded.append(entry.load()))
    if isinstance(failure, InputError):
        raise failure
    if failure is not None:
        raise ConfigError(f"{origin}: {entry.value} cannot be imported: {in_one_line(failure)}") from failure
    return loaded[0]


def failure_of(work: Callable[[], object]) -> Exception | None:
    """The exception that a call of other people's code raises; None where it raises none."""
    try:
        work()
    except Exception as failure:  # noqa: BLE001 - whatever it is, the caller tells it in one line
        return failure
    return None


def in_one_line(error: Exception) -> str:
    """An exception of other people's code in one line: its type and its message."""
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
