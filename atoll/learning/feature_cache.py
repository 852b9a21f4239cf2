"""Features on disk, by the key of their example: mapped into memory, never loaded as a whole.

A part is a safetensors file of `keys` [n, 32], sorted, and `features` [n, width]; a key is found by
bisection and only the pages that are asked for are read. A part appears under its name when it is
whole and is never written again, so that processes share a folder and may be killed at any instant.
Small parts are merged; whoever still has the old ones mapped keeps reading them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atoll.errors import InputError

logger = logging.getLogger(__name__)

KEY = np.dtype("V32")
"""A key as numpy compares it: 32 bytes, of which trailing zeros count too."""

MAX_SMALL_PARTS = 32
"""Small parts that a folder may have before they are merged."""
SMALL_PART_BYTES = 128 << 20
"""Bytes of features below which a part counts as small; a merge needs little more memory than this."""
BLOCK = 1 << 14
"""How many rows are copied at a time."""
READINGS = 5
"""How often a folder is read again when files vanish because other processes merge them."""
ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished file counts as left by a process that died."""


@dataclass(frozen=True)
class Part:
    """One mapped file of the cache: sorted keys [n] and their features [n, width]."""

    name: str
    keys: NDArray[np.void]
    features: NDArray[np.float32]

    @classmethod
    def open(cls, file: Path, name: str) -> Part:
        """Map a file; the mapped content stays readable when the file is deleted.

        Raises:
            FileNotFoundError: the file was deleted.
            SafetensorError, ValueError, OSError: the file is damaged.
        """
        with safe_open(file, "pt") as opened:
            keys, features = opened.get_tensor("keys"), opened.get_tensor("features")
        kinds = (keys.dtype, features.dtype, features.ndim)
        if kinds != (torch.uint8, torch.float32, 2) or keys.shape != (len(features), 32):
            raise ValueError(f"keys {tuple(keys.shape)} do not fit features {tuple(features.shape)}")
        return cls(name, keys.numpy().view(KEY).reshape(-1), features.numpy())

    def mapped_anew(self, file: Path) -> Part:
        """The same part, mapped again, so that pages read so far do not count as this process's memory."""
        try:
            return Part.open(file, self.name)
        except (SafetensorError, OSError, ValueError):  # merged by another process
            return self

    @property
    def size(self) -> int:
        """The size of the features in bytes."""
        return self.features.nbytes

    def match(self, keys: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(places of those keys that this part has, their rows in it); keys must be sorted and distinct."""
        if len(self.keys) < len(keys):
            return _match(self.keys, keys)[::-1]
        return _match(keys, self.keys)


def _match(few: NDArray[np.void], many: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places in the one, places in the other) of the keys that two sorted arrays have in common."""
    if not len(few):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.searchsorted(many, few)
    places[places == len(many)] = 0
    common = np.flatnonzero(many[places] == few)
    return common, places[common]


@dataclass
class FeatureCache:
    """Features by example key, in the safetensors files of one folder; safe to share and to kill."""

    folder: Path
    _parts: dict[str, Part] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    @property
    def width(self) -> int:
        """The width of the cached features; there must be some."""
        width: int = next(iter(self._parts.values())).features.shape[1]
        return width

    @property
    def kept_width(self) -> int | None:
        """The width of the cached features; None where there are none."""
        if not self._parts:
            self._read_folder()
        return self.width if self._parts else None

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Places of the keys that have no features yet, the first of equal keys only."""
        distinct, first = np.unique(key_table(keys), return_index=True)
        absent = self._absent(distinct)
        if len(absent):
            self._read_folder()
            absent = absent[self._absent(distinct[absent])]
        places: list[int] = np.sort(first[absent]).tolist()
        return places

    def take(self, keys: Sequence[bytes], out: torch.Tensor | None = None) -> torch.Tensor:
        """Features [len(keys), width] of the keys, written into `out` where it is given.

        Raises:
            KeyError: a key has no features.
        """
        table = key_table(keys)
        out = torch.empty((len(table), self.width)) if out is None else out
        distinct, first, inverse = np.unique(table, return_index=True, return_inverse=True)
        self._copy(distinct, out, first)
        source = first[inverse]
        again = np.flatnonzero(source != np.arange(len(table)))
        out[torch.from_numpy(again)] = out[torch.from_numpy(source[again])]
        return out

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Add features of distinct keys.

        Raises:
            InputError: the folder can't be written.
        """
        table = key_table(keys)
        order = np.argsort(table)
        try:
            self._write(table[order], features[torch.from_numpy(order)])
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.folder}: features cannot be kept: {error}; expected room in a writable $ATOLL_CACHE"
            ) from None
        self._merge_small()

    def _absent(self, keys: NDArray[np.void]) -> NDArray[np.int64]:
        """Places of the sorted, distinct keys that no part has."""
        absent = np.ones(len(keys), dtype=bool)
        for part in self._parts.values():
            absent[part.match(keys)[0]] = False
        return np.flatnonzero(absent)

    def _copy(self, keys: NDArray[np.void], out: torch.Tensor, to: NDArray[np.int64]) -> None:
        """Copy the features of sorted, distinct keys to the rows `to`."""
        rows_out = out.numpy()
        there = np.zeros(len(keys), dtype=bool)
        for name, part in list(self._parts.items()):
            places, rows = part.match(keys)
            there[places] = True
            for start in range(0, len(places), BLOCK):
                block = slice(start, start + BLOCK)
                rows_out[to[places[block]]] = part.features[rows[block]]
            if len(places) >= BLOCK:
                self._parts[name] = part.mapped_anew(self.folder / name)
        if not there.all():
            raise KeyError(keys[~there][0].tobytes().hex())

    def _write(self, table: NDArray[np.void], features: torch.Tensor) -> Part:
        """Write a new part, which gets its name once complete, and map it before others can merge it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(table.tobytes()).hexdigest()[:24] + ".safetensors"
        temporary = self.folder / f".{os.getpid()}-{threading.get_ident()}-{name}"
        flat = torch.from_numpy(table.view(np.uint8).reshape(-1, 32).copy())
        try:
            save_file({"keys": flat, "features": features.contiguous()}, temporary)
            _sync(temporary)
            part = Part.open(temporary, name)
            temporary.replace(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        self._parts[name] = part
        return part

    def _read_folder(self) -> None:
        """Map the files that are in the folder now, and drop parts whose files are not."""
        for _ in range(READINGS):
            names = sorted(file.name for file in self.folder.glob("[!.]*.safetensors"))
            new = [name for name in names if name not in self._parts and name not in self._refused]
            if all(self._map(name) for name in new):
                break
        self._parts = {name: self._parts[name] for name in names if name in self._parts}
        self._merge_small()

    def _map(self, name: str) -> bool:
        """Map a file; False if it was deleted. A damaged one is removed, so that it is computed again."""
        file = self.folder / name
        try:
            self._parts[name] = Part.open(file, name)
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s: damaged, its features are computed again: %s", file, error)
            self._refused.add(name)
            _remove(file)
        return True

    def _merge_small(self) -> None:
        """Merge small parts, if there are many, into few: each is larger than all smaller ones together.

        A row is therefore written again only when its part at least doubles in size.
        """
        small = sorted((p for p in self._parts.values() if p.size < SMALL_PART_BYTES), key=lambda p: p.size)
        if len(small) <= MAX_SMALL_PARTS:
            return
        while small[-1].size > sum(part.size for part in small[:-1]):
            small.pop()
        try:
            for group in _grouped(small):
                self._merge(group)
        except (OSError, SafetensorError) as error:
            logger.debug("%s: small parts stay as they are: %s", self.folder, error)
        for file in self.folder.glob(".*.safetensors"):
            _remove_abandoned(file)

    def _merge(self, parts: Sequence[Part]) -> None:
        table = np.unique(np.concatenate([part.keys for part in parts]))
        features = torch.empty((len(table), self.width))
        self._copy(table, features, np.arange(len(table)))
        merged = self._write(table, features)
        for part in parts:
            if part.name != merged.name:
                del self._parts[part.name]
                _remove(self.folder / part.name)


def _grouped(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts in groups that are no longer small, but for the last."""
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if sum(p.size for p in group) >= SMALL_PART_BYTES:
            yield group
            group = []
    if group:
        yield group


def key_table(keys: Sequence[bytes]) -> NDArray[np.void]:
    """Keys of 32 bytes as an array [len(keys)]."""
    return np.frombuffer(b"".join(keys), dtype=KEY)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: stays: %s", file, error)


def _remove_abandoned(file: Path) -> None:
    """Remove the unfinished file of a process that died while writing."""
    try:
        if time.time() - file.stat().st_mtime > ABANDONED:
            file.unlink()
    except OSError as error:
        logger.debug("%s: stays: %s", file, error)
