"""`task.options` of language modelling."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atoll.job.section import Section


class LanguageOptions(Section):
    """The lengths of examples and answers in tokens, and how conversations are written.

    `template`: Jinja source of a chat template in place of the tokenizer's; if empty, prompts and completions
    are concatenated. `temperature`: 0 generates greedily, more samples. `samples`: the number of held-out
    prompts for which a run's report shows the model's text before and after training. `packing`: short
    examples of a batch share rows without attending to each other.
    """

    max_tokens: Annotated[int, Field(ge=2, le=8192)] = 256
    template: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    samples: Annotated[int, Field(ge=0, le=100)] = 3
    packing: bool = False
