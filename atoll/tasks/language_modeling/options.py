"""`task.options` of language modelling."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atoll.job.section import Section


class LanguageOptions(Section):
    """How long examples and answers may be, and how conversations are written.

    `template`: jinja source in place of the tokenizer's own; an empty one joins prompts and completions as
    they stand. `temperature`: 0 writes the likeliest token each time, more draws from what is likely.
    `samples`: for so many held-out prompts a run's report shows what the model writes before and after.
    `packing`: short examples of a batch share rows, none of which sees another.
    """

    max_tokens: Annotated[int, Field(ge=2, le=8192)] = 256
    template: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    samples: Annotated[int, Field(ge=0, le=100)] = 3
    packing: bool = False
