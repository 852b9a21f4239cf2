"""Watches that no product is computed of memory that begins where torch's own never does."""

from __future__ import annotations

from collections.abc import Sequence
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


def lies_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether its values begin at another address than a tensor's own could: they came from outside.

    A part of a tensor's own memory, such as a row, begins anywhere, but in each process at the same distance
    from the memory's start. A part of a mapped file does too, but the same values may be in other files.
    """
    if tensor.device.type != "cpu" or tensor.numel() < 2:
        return False
    memory = tensor.untyped_storage()
    is_foreign = memory.data_ptr() % ALIGNMENT != 0 or memory.filename is not None
    return is_foreign and tensor.data_ptr() % ALIGNMENT != 0


class WatchesProducts(TorchDispatchMode):
    """Collects the operands of products that lie elsewhere: (operation, place, shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.found: list[tuple[str, int, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
            for place, operand in enumerate(args):
                if isinstance(operand, torch.Tensor) and lies_elsewhere(operand):
                    self.found.append((name, place, tuple(operand.shape)))
        return func(*args, **(kwargs or {}))
