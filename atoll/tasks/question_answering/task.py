"""Question answering: a question, with or without a context, and the answer written out.

Loss: cross-entropy of the answer's next token, the mean over each answer's own tokens, then over answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import torch
from pydantic import Field

from atoll.backbones.encoder import Model
from atoll.backbones.options import options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyRows
from atoll.data.parsers import answer_cell, optional_text_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.job.job import DataSection, Job, Options
from atoll.job.section import Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.losses import surprise
from atoll.tasks.question_answering.seq2seq import answer_tokenizer, load_answerer
from atoll.tasks.schema_task import SchemaTask

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

IGNORE_INDEX = -100
"""A target that isn't there: behind a short answer."""

QUESTIONS = Schema(
    (
        SchemaField("question", text_cell, pa.string(), ("query",)),
        SchemaField("context", optional_text_cell, pa.string(), ("passage", "paragraph"), required=False),
        SchemaField("answer", answer_cell, pa.string(), ("target", "response")),
    )
)


class AnswerOptions(Section):
    """`task.options` of question answering: the most tokens that an answer is written with."""

    max_answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 16


@dataclass(frozen=True)
class QuestionAnswering(SchemaTask):
    """Targets are [n, max_answer_tokens + bytes]: the answer's tokens, then its text in UTF-8, to score."""

    told = ()

    name: str = "question-answering"
    summary: str = "an answer in words, from a context or without; T5, BART, …; exact match, token F1"
    uses_pooled_features: bool = False
    sees_targets: bool = True
    primary_metric: str = "exact_match"
    options: AnswerOptions = field(default_factory=AnswerOptions)
    backbone: Backbone | None = None

    def configured(self, job: Job, backbone: Backbone) -> QuestionAnswering:
        return replace(self, options=options_of(job.task.options, AnswerOptions), backbone=backbone)

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.backbone is not None, "a shard is asked of the task that is bound to a job"
        return answer_tokenizer(self.backbone)

    def check(self, job: Job) -> None:
        options_of(job.task.options, AnswerOptions)
        QUESTIONS.check(job.data)
        refuse_augment(job)

    def records(self, options: Options) -> Schema:
        return QUESTIONS

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        return {}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        questions, answers = dataset["question"][:], dataset["answer"][:]
        contexts = dataset["context"][:] if "context" in dataset.column_names else [""] * len(dataset)
        inputs = LazyRows(lambda place: prompt(questions[place], contexts[place]), tuple(order))
        targets = self.targets([answers[place] for place in order])
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def targets(self, answers: Sequence[str]) -> torch.Tensor:
        """The tokens to learn (of a long answer the first ones), and the whole text to be measured by."""
        most = self.options.max_answer_tokens
        tokens = self._tokenizer(text_target=list(answers), truncation=True, max_length=most)["input_ids"]
        texts = [list(answer.encode()) for answer in answers]
        table = torch.full((len(answers), most + max(map(len, texts), default=0)), IGNORE_INDEX)
        for row, known, text in zip(table, tokens, texts, strict=True):
            row[: len(known)] = torch.tensor(known)
            row[most : most + len(text)] = torch.tensor(text)
        return table

    def input_suffixes(self) -> tuple[str, ...]:
        return (".txt",)

    def parse_input(self, given: str) -> Any:
        """A question, or a whole prompt `question: … context: …`; a text file's, or the text itself.

        Raises:
            DataError: it can't be read, or is empty.
        """
        text = read_text_input(given)
        return text if text.startswith("question: ") else prompt(text, "")

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        options = options_of(job.task.options, AnswerOptions)
        return load_answerer(backbone, job, answer_tokenizer(backbone), options.max_answer_tokens)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return surprise(outputs, targets[:, : outputs.shape[1]])

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.question_answering.metrics import ExactMatch, TokenF1

        return MetricCollection({"exact_match": ExactMatch(), "token_f1": TokenF1()}, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """Answers as they were written, and as they stand in the data."""
        texts = targets[:, self.options.max_answer_tokens :].tolist()
        return predictions, [bytes(b for b in text if b >= 0).decode() for text in texts]

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        return [{"label": text} for text in predictions]


def prompt(question: str, context: str) -> str:
    """What the network reads: the question first, so that only a context is ever cut.

    >>> prompt("where is Anna?", "Anna is in the garden.")
    'question: where is Anna? context: Anna is in the garden.'
    """
    return f"question: {question} context: {context}" if context else f"question: {question}"


QUESTION_ANSWERING = QuestionAnswering()
