"""Which packages a job's work imports: a fork server imports them before it forks the processes for it."""

from __future__ import annotations

from atoll.job.job import Job

LEARNING = ("torch", "torchmetrics.classification")
TEXT = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
TOKENS = ("transformers.models.auto.tokenization_auto",)
IMAGES = ("torchvision.models",)
PRIVATE = ("opacus.grad_sample",)
ADAPTERS = ("peft",)
TABLES = ("pandas",)
"""pyarrow looks whether it is there when it makes its first array, which takes a second."""

ANY = (*LEARNING, *TEXT, *TOKENS, *IMAGES, *TABLES)
"""For a process that doesn't know yet which jobs it will get."""


def imports_of(job: Job) -> tuple[str, ...]:
    """The modules, by full name, that training and measuring for this job import.

    A list that misses one costs time only: the process that needs it imports it then.
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
