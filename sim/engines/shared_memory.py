"""Memory that several processes share: a round's model, and a slot for each client's update.

A model of millions of numbers would otherwise be copied through pipes several times for every client. The
memory has no name in any file system and is released when the processes end, however they end.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from atoll.protocol.tensors import ALIGNMENT, Tensors


@dataclass(frozen=True)
class Place:
    """The position of a tensor in a slot, with its dtype and shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What another process needs to open the memory: its creator, and where the tensors lie."""

    process: int
    handle: int
    key: str
    slots: int
    size: int
    places: Mapping[str, Place]


class SharedTensorSlots:
    """`slots` sets of tensors with the names, shapes and dtypes of one model."""

    def __init__(self, layout: Layout, handle: int) -> None:
        self.layout = layout
        self._memory = mmap.mmap(handle, layout.slots * layout.size)

    @classmethod
    def like(cls, tensors: Tensors, slots: int) -> SharedTensorSlots:
        """New shared memory for `slots` sets of tensors like these, all zeros.

        Raises:
            OSError: there is not enough memory.
        """
        places, size = {}, 0
        for name, tensor in tensors.items():
            places[name] = Place(size, tensor.dtype, tuple(tensor.shape))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        handle = os.memfd_create("atoll-board", os.MFD_CLOEXEC)
        os.ftruncate(handle, max(1, slots * size))
        return cls(Layout(os.getpid(), handle, secrets.token_hex(8), slots, size, places), handle)

    @classmethod
    def opened(cls, layout: Layout) -> SharedTensorSlots:
        """The same memory in another process, while its creator lives."""
        handle = os.open(f"/proc/{layout.process}/fd/{layout.handle}", os.O_RDWR)
        try:
            return cls(layout, handle)
        finally:
            os.close(handle)

    def fits(self, tensors: Tensors, slots: int) -> bool:
        """Whether the tensors have this memory's names, shapes and dtypes, and it has enough slots."""
        forms = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        places = {name: (place.dtype, place.shape) for name, place in self.layout.places.items()}
        return forms == places and slots <= self.layout.slots

    def tensors(self, slot: int) -> Tensors:
        """The tensors of a slot: views of the shared memory, not copies."""
        return {name: self._view(slot, place) for name, place in self.layout.places.items()}

    def put(self, slot: int, tensors: Tensors) -> None:
        """Copy tensors, which must fit, into a slot."""
        for name, view in self.tensors(slot).items():
            view.copy_(tensors[name])

    def close(self) -> None:
        """Release the memory as soon as no view of it exists any more."""
        if self.layout.process == os.getpid():
            os.close(self.layout.handle)

    def _view(self, slot: int, place: Place) -> torch.Tensor:
        if not prod(place.shape):
            return torch.empty(place.shape, dtype=place.dtype)
        start = slot * self.layout.size + place.start
        flat = torch.frombuffer(self._memory, dtype=place.dtype, count=prod(place.shape), offset=start)
        return flat.view(place.shape)


def can_share() -> bool:
    """Whether this system supports such memory."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")  # noqa: PTH112
