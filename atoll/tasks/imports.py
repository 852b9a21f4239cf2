"""The packages that work on a job will import, so that a fork server can import them before it forks."""

from __future__ import annotations

from atoll.job.job import Job

LEARNING = ("torch", "torchmetrics.classification")
TEXT = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
TOKENS = ("transformers.models.auto.tokenization_auto",)
IMAGES = ("torchvision.models",)
PRIVATE = ("opacus.grad_sample",)
ADAPTERS = ("peft",)
TABLES = ("pandas",)
"""pyarrow tries to import pandas when it makes its first array, which takes a second."""

ANY = (*LEARNING, *TEXT, *TOKENS, *IMAGES, *TABLES)
"""The modules for a process that doesn't know its jobs yet."""


def imports_of(job: Job) -> tuple[str, ...]:
    """The full names of the modules that training and evaluating this job import.

    A missing module costs only time: the process that needs it imports it.
    """
    modules = list(LEARNING)
    if job.backbone.name.startswith("torchvision:"):
        modules += IMAGES
    elif not job.backbone.name.startswith(("atoll:", "raw:", "task:", "plugin:")):
        modules += [*TEXT, *TOKENS]
    if job.privacy.unit in ("example", "both"):
        modules += PRIVATE
    if any(stage.tune.method == "lora" for stage in job.stages):
        modules += ADAPTERS
    return tuple(modules)
