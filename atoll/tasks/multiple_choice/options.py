"""`task.options` of multiple choice."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.multiple_choice.data import Reading


class ChoiceOptions(LanguageOptions):
    """How questions are put, and what is measured.

    `listed`: the choices stand under the question, each with its letter. `generated`: in every measurement
    the model also writes its answers, greedily. `answers`: what an answer in the data is, where it is text.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 32
    temperature: Annotated[float, Field(ge=0, le=0)] = 0.0
    listed: bool = True
    generated: bool = True
    answers: Reading = "any"
