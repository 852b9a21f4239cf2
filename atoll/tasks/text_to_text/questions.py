"""Generative question answering, with or without a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import pyarrow as pa
from pydantic import Field

from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.data.dataset import Dataset
from atoll.data.parsers import answer_cell, optional_text_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.texts import read_text_input
from atoll.job.job import Job
from atoll.job.section import Options, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.text_to_text.sequence_task import SequenceTask, measured

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

QUESTIONS = Schema(
    (
        SchemaField("question", text_cell, pa.string(), ("query",)),
        SchemaField("context", optional_text_cell, pa.string(), ("passage", "paragraph"), required=False),
        SchemaField("answer", answer_cell, pa.string(), ("target", "response")),
    )
)


class AnswerOptions(Section):
    """`task.options` of question answering: the most tokens of an answer."""

    max_answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 16


@dataclass(frozen=True)
class QuestionAnswering(SequenceTask):
    """Question answering as text to text: the input is a question and its context, which may be cut."""

    name: str = "question-answering"
    summary: str = "an answer in words, from a context or without; T5, BART, …; exact match, token F1"
    primary_metric: str = "exact_match"
    target: str = "answer"
    options: AnswerOptions = field(default_factory=AnswerOptions)
    backbone: Backbone | None = None

    def configured(self, job: Job, backbone: Backbone) -> QuestionAnswering:
        return replace(self.with_options(job.task.options), backbone=backbone)

    @property
    def most(self) -> int:
        return self.options.max_answer_tokens

    def with_options(self, options: Options) -> Self:
        return replace(self, options=options_of(options, AnswerOptions))

    def records(self, options: Options) -> Schema:
        return QUESTIONS

    def prompts(self, dataset: Dataset) -> Callable[[int], str]:
        questions = dataset["question"][:]
        contexts = dataset["context"][:] if "context" in dataset.column_names else [""] * len(dataset)
        return lambda row: prompt(questions[row], contexts[row])

    def parse_input(self, line: str) -> Any:
        """The prompt for a question, from a text file or `line` itself; a complete prompt stays unchanged.

        A complete prompt has the form `question: … context: …`.

        Raises:
            DataError: the file can't be read, or the text is empty.
        """
        text = read_text_input(line)
        return text if text.startswith("question: ") else prompt(text, "")

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from atoll.tasks.text_to_text.metrics import ExactMatch, TokenF1

        return measured({"exact_match": ExactMatch(), "token_f1": TokenF1()})


def prompt(question: str, context: str) -> str:
    """The network's input; the question comes first, so that only the context is cut if it is too long.

    >>> prompt("where is Anna?", "Anna is in the garden.")
    'question: where is Anna? context: Anna is in the garden.'
    """
    return f"question: {question} context: {context}" if context else f"question: {question}"


QUESTION_ANSWERING = QuestionAnswering()
