"""Watches that no product is computed of memory that begins where torch's own never does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.protocol.tensors import ALIGNMENT

PRODUCTS = {
    "mm", "addmm", "mv", "addmv", "dot", "vdot", "bmm", "baddbmm", "addbmm", "addr", "linear",
    "convolution", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu",
    "native_layer_norm", "_cdist_forward",
}  # fmt: skip
"""torch's operations whose sums of products are another library's, or may be."""


def mapped_files() -> Iterator[tuple[int, int, Path]]:
    """(start, end, file) of what of files is in this process's memory, deleted ones too."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(place, 16) for place in fields[0].split("-"))
            yield start, end, Path(fields[5].removesuffix(" (deleted)"))


def mapped_file(tensor: torch.Tensor) -> Path | None:
    """The file whose content a tensor's memory is, by what the system says; None where it is no file's."""
    return next((file for start, end, file in mapped_files() if start <= tensor.data_ptr() < end), None)


class WatchesProducts(TorchDispatchMode):
    """Collects the operands of products that lie elsewhere: (operation, place, shape).

    A part of a tensor's own memory, such as a row, begins anywhere, but in each process at the same distance
    from the memory's start. So does a tensor in a mapped file of a network's weights, which is the same file
    everywhere. The files in a run's `folder` hold what other processes have in memory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.products = 0
        self.found: list[tuple[str, int, tuple[int, ...]]] = []
        self._known: dict[int, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
            for place, operand in enumerate(args):
                if isinstance(operand, torch.Tensor) and self._lies_elsewhere(operand):
                    self.found.append((name, place, tuple(operand.shape)))
        return func(*args, **(kwargs or {}))

    def _lies_elsewhere(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.numel() < 2:
            return False
        begin = tensor.untyped_storage().data_ptr()
        if begin % ALIGNMENT == 0:
            return False
        if begin not in self._known:
            file = mapped_file(tensor)
            self._known[begin] = file is None or file.is_relative_to(self.folder)
        return self._known[begin]
