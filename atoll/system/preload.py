"""What a fork server imports once for all its processes; see `fork_server`.

The modules stay, and so do the million objects that they are made of. The garbage collector isn't to look
for garbage among them: while they are imported that takes a sixth of the time, and in a forked process one
look takes half a second and copies 170 MB of memory that it shared until then.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

MODULES = "ATOLL_PRELOAD"
"""The environment variable that names them, with spaces between."""


def preload() -> None:
    """Import what the environment names, and keep it from the garbage collector for good.

    What isn't installed is left out, and missed by the process that needs it.
    """
    gc.disable()
    for module in os.environ.pop(MODULES, "").split():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()
    gc.enable()


if MODULES in os.environ:  # a fork server imports this module, and calls nothing in it
    preload()
