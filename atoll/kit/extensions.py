"""The installed extensions that a job uses: server and sites must have the same ones, file by file.

What they are called in a run's bundle: `fedmine 1.2: fedmine/__init__.py`, with the file's sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.kit.code_hashes import differing, shown_files
from atoll.plugins import BACKBONE_PREFIX, GROUPS, brought

MARK = ": "
"""Between a distribution with its version and a file of it; Atoll's own files have none of it."""


def extension_hashes(job: Job) -> dict[str, str]:
    """The sha256 of each file of the distributions that bring what the job names and sites need.

    That is a strategy, a task, metrics, backbones and augmentations. A source and a partition are left out:
    they are for a simulation, and real sites hold their own shards.

    Raises:
        ConfigError: a plugin file brings one of them, which no site can have.
    """
    names = [("strategy", job.strategy.name), ("task", job.task.name)]
    names += [("metric", name) for name in job.evaluate.metrics]
    names += [("augmentation", name) for name in job.train.augment]
    networks = [name for name in (job.backbone.name, *job.backbone.options.values()) if isinstance(name, str)]
    named = (name.partition(BACKBONE_PREFIX) for name in networks)
    names += [("backbone", short) for before, prefix, short in named if prefix and not before]
    hashes: dict[str, str] = {}
    for kind, name in names:
        try:
            extension = brought(kind, name)
        except KeyError:  # Atoll's own
            continue
        distribution = None if extension.entry is None else extension.entry.dist
        if distribution is None:
            raise ConfigError(
                f"{kind} {name!r} comes from {extension.origin}, which sites can't have; expected an"
                " installed package with an entry point"
            )
        hashes |= hashes_of(distribution)
    return hashes


def hashes_of(distribution: Distribution) -> dict[str, str]:
    """The sha256 of each Python file of a distribution, under its name, version and path."""
    mark = f"{distribution.name} {distribution.version}{MARK}"
    files = dict(_files(distribution))
    return {mark + name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)}


def _files(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    """Those that it lists, and those of the packages that its entry points name, where they really lie.

    An editable installation lists none of its own, and a package may be put beside it.
    """
    for listed in distribution.files or ():
        place = Path(str(distribution.locate_file(listed)))
        if listed.suffix == ".py" and place.is_file():
            yield listed.as_posix(), place
    tops = {e.value.partition(":")[0].split(".")[0] for e in distribution.entry_points if _is_ours(e.group)}
    for top in tops:
        spec = find_spec(top)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        if spec.submodule_search_locations is None:
            yield origin.name, origin
            continue
        root = origin.parent
        yield from ((f"{top}/{path.relative_to(root).as_posix()}", path) for path in root.rglob("*.py"))


def _is_ours(group: str) -> bool:
    return group in GROUPS.values()


def refusal(theirs: Mapping[str, str]) -> str | None:
    """Why the extensions that a bundle names aren't those installed here; None where they are."""
    for named in _distributions(theirs):
        name, version = named.rsplit(" ", 1)
        try:
            here = Distribution.from_name(name)
        except (PackageNotFoundError, ValueError):
            return f"extension {named} is not installed here"
        if not any(_is_ours(entry.group) for entry in here.entry_points):
            return f"extension {named} is not installed here: {name} brings nothing for Atoll"
        if here.version != version:
            return f"extension {named} is not installed here, but {here.version}"
        wanted = {key: value for key, value in theirs.items() if key.startswith(named + MARK)}
        other = [key.partition(MARK)[2] for key in differing(hashes_of(here), wanted)]
        if other:
            return f"extension {named} has other files here: {shown_files(other)}"
    return None


def _distributions(hashes: Iterable[str]) -> list[str]:
    """`fedmine 1.2`, …: which extensions a bundle's hashes are of."""
    return sorted({key.partition(MARK)[0] for key in hashes if is_of_extension(key)})


def is_of_extension(name: str) -> bool:
    """Whether a bundle's hash is of an extension's file, and not of Atoll's own."""
    return MARK in name and " " in name.partition(MARK)[0]
