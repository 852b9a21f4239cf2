"""`task.options` of multiple choice."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.multiple_choice.data import Reading


class ChoiceOptions(LanguageOptions):
    """How questions are presented, and what is measured.

    `listed`: the prompt lists the choices below the question, each with its letter. `generated`: every
    evaluation also lets the model write its answers, greedily. `answers`: what an answer in the data is, if
    it is text: a choice's text, letter or number.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 32
    temperature: Annotated[float, Field(ge=0, le=0)] = 0.0
    listed: bool = True
    generated: bool = True
    answers: Reading = "any"
