"""Large replies kept in files: the server's memory then doesn't grow with how many clients train in a round.

Tensors are written to a file of safetensors and mapped from it: what of them is in memory is the page
cache's, which the system takes back when it needs it. A file that is mapped has no name any more, so its
room on the disk is free as soon as nobody holds its tensors, however the process ends. What a process that
was killed leaves is a file that it was writing; whoever opens the run's directory removes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open

from atoll.protocol.fields import SHARED
from atoll.protocol.messages import Reply
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors, file_parts, size_of
from atoll.system.durable_files import remove, write_synced

LEAST_BYTES = 8 * 2**20
"""Of a reply that goes to a file. Fifty smaller ones take less memory than torch itself; a file of this size
costs a few milliseconds, of a client that has trained two million numbers."""

AnyReply = TypeVar("AnyReply", bound=Reply)


WrittenTensors = tuple[Path, list[str]]
"""A file, and the names of the tensors in it."""


class MappedTensors(dict[str, torch.Tensor]):
    """Tensors whose memory is a file's. Who changes one has a copy of the pages that change."""


def kept_on_disk(reply: AnyReply, folder: Path) -> AnyReply:
    """A reply whose tensors are in files without a name, if they are large; the same reply if not.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    sets = {one.name: getattr(reply, one.name) for one in fields(reply) if one.metadata == SHARED}
    fresh = {name: tensors for name, tensors in sets.items() if not isinstance(tensors, MappedTensors)}
    if not is_large(*fresh.values()):
        return reply
    mapped = {name: taken(written(tensors, folder)) for name, tensors in fresh.items() if tensors}
    changed: AnyReply = replace(cast(Any, reply), **mapped)
    return changed


def is_large(*sets: Tensors) -> bool:
    """Whether those tensors of one reply go to files."""
    return sum(map(size_of, sets)) >= LEAST_BYTES


def all_kept_on_disk(replies: Iterable[Reply], folder: Path) -> Iterable[Reply]:
    """The replies as they come, large ones in files; a cohort that trained at once stays one stack.

    Nothing holds a reply while the next one is waited for, as the variable of a loop would.
    """
    if isinstance(replies, StackedUpdates):
        return replies
    return map(partial(kept_on_disk, folder=folder), replies)


def written(tensors: Tensors, folder: Path) -> WrittenTensors:
    """(a new file with the tensors, for its owner's eyes alone, their names); nobody waits for the disk.

    Names come from other machines and may be anything, so in the file they are numbers.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, names = folder / f"{secrets.token_hex(8)}.safetensors", list(tensors)
    parts = file_parts({str(number): tensors[name] for number, name in enumerate(names)})
    try:
        write_synced(path, parts, 0o600, durable=False)
    except OSError:
        remove(path)
        raise
    return path, names


def taken(file: WrittenTensors) -> MappedTensors:
    """The tensors of a file that `written` made; it has no name any more."""
    path, names = file
    with safe_open(path, framework="pt") as opened:
        mapped = MappedTensors((name, opened.get_tensor(str(number))) for number, name in enumerate(names))
    remove(path)
    return mapped
