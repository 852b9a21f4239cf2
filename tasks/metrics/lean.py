"""torchmetrics without what its other metrics bring with them: transformers, torchvision, matplotlib, scipy.

It looks for these packages when it is imported, and imports those that are there, for metrics and plots that
no task here has: longer than torch itself takes, and forty times as long as without. In a command of ours it
is told that they are not there. Where somebody else's program imports Atoll, torchmetrics comes whole: that
program may want the rest of it.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from protocol.messages import Facts
    from tasks.seam import Task

ASKED = "ATOLL_LEAN_METRICS"
"""Set in the environment of our own commands, and so in that of the processes that they start."""

LEFT_OUT = ("transformers", "torchvision", "matplotlib", "scipy")

_FLAGS = "torchmetrics.utilities.imports"
_first = threading.Lock()


def metrics_of(task: Task, facts: Facts) -> MetricCollection:
    """The task's metrics; where nobody has imported torchmetrics before, and it is asked for, a lean one."""
    with _first:
        if os.environ.get(ASKED) == "1" and "torchmetrics" not in sys.modules:
            _import_lean()
    return task.metrics(facts)


def _import_lean() -> None:
    from lightning_utilities.core import imports

    _load_flags(imports.RequirementCache)
    available = imports.package_available
    vars(imports)["package_available"] = lambda name: name not in LEFT_OUT and available(name)
    try:
        import torchmetrics  # noqa: F401
    finally:
        vars(imports)["package_available"] = available


def _load_flags(kind: type) -> None:
    """Load the module in which torchmetrics notes what is installed, and note that those packages aren't."""
    found = find_spec("torchmetrics")
    assert found is not None and found.origin is not None
    spec = spec_from_file_location(_FLAGS, Path(found.origin).parent / "utilities" / "imports.py")
    assert spec is not None and spec.loader is not None
    flags = module_from_spec(spec)
    spec.loader.exec_module(flags)
    for flag in vars(flags).values():
        if isinstance(flag, kind) and str(vars(flag)["requirement"]).startswith(LEFT_OUT):
            vars(flag).update(available=False, message="left out, no metric of Atoll's needs it")
    sys.modules[_FLAGS] = flags
