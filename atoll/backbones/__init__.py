"""Backbones: which one a job names, its checkpoint, and encoders for each kind of input.

`ImageBackbone`, `TextBackbone` and `SoundBackbone` are what a backbone of one's own derives from.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.backbones.brought.modules import ImageBackbone, SoundBackbone, TextBackbone

__all__ = ["ImageBackbone", "SoundBackbone", "TextBackbone"]


def __getattr__(name: str) -> Any:
    """What a backbone is written with: it brings torch, and is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'atoll.backbones' has no attribute {name!r}")
    return getattr(import_module("atoll.backbones.brought.modules"), name)
