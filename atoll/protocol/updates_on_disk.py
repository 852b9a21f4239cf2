"""Moves large replies to files, so that the server's memory doesn't grow with the clients of a round.

Tensors are written to a safetensors file and mapped from it, so that the system's page cache holds them and
can drop them. A mapped file has no name any more, so its disk space is released when its tensors are, however
the process ends. A killed process can leave only a file that it was writing, which is removed when the run's
directory is opened again.
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
from atoll.protocol.tensors import Tensors, mapped_file_parts, size_of
from atoll.system.durable_files import remove, write_synced

LEAST_BYTES = 8 * 2**20
"""The least size of a reply that is moved to a file: fifty smaller ones take less memory than torch itself,
and writing a file of this size takes a few milliseconds."""

AnyReply = TypeVar("AnyReply", bound=Reply)


WrittenTensors = tuple[Path, list[str]]
"""(a file, the names of the tensors in it)."""


class MappedTensors(dict[str, torch.Tensor]):
    """Tensors that are mapped from a file; pages that are changed become private copies."""


def kept_on_disk(reply: AnyReply, folder: Path) -> AnyReply:
    """The reply with its tensors in files without a name, if they are large; else the same reply.

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
    """Whether the tensors of one reply are large enough for a file."""
    return sum(map(size_of, sets)) >= LEAST_BYTES


def all_kept_on_disk(replies: Iterable[Reply], folder: Path) -> Iterable[Reply]:
    """The replies as they arrive, large ones in files; stacked updates stay one stack.

    No variable holds a reply while the next one is awaited, so that its memory can be released.
    """
    if isinstance(replies, StackedUpdates):
        return replies
    return map(partial(kept_on_disk, folder=folder), replies)


def written(tensors: Tensors, folder: Path) -> WrittenTensors:
    """(a new file with the tensors, readable by its owner only; their names), without waiting for the disk.

    In the file, tensors are named by numbers, since their names come from other machines and may be anything.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, names = folder / f"{secrets.token_hex(8)}.safetensors", list(tensors)
    parts = mapped_file_parts({str(number): tensors[name] for number, name in enumerate(names)})
    try:
        write_synced(path, parts, 0o600, durable=False)
    except OSError:
        remove(path)
        raise
    return path, names


def taken(file: WrittenTensors) -> MappedTensors:
    """The tensors of a file that `written` made, mapped; the file's name is removed."""
    path, names = file
    with safe_open(path, framework="pt") as opened:
        mapped = MappedTensors((name, opened.get_tensor(str(number))) for number, name in enumerate(names))
    remove(path)
    return mapped
