"""Text to text: generates a target text from a source text, such as a translation or a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import Field

from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.parsers import answer_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.texts import read_text_input
from atoll.job.job import Job
from atoll.job.section import Options, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.text_to_text.questions import prompt
from atoll.tasks.text_to_text.sequence_task import SequenceTask, measured

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

PAIRS = Schema(
    (
        SchemaField("source", text_cell, pa.string(), ("input", "document", "article", "text")),
        SchemaField("target", answer_cell, pa.string(), ("output", "summary", "translation", "highlights")),
    )
)
Measure = Literal["exact_match", "token_f1", "rouge_l", "bleu"]


class TextToTextOptions(Section):
    """`task.options` of text to text.

    `prefix` is put before each source, as in T5's training ("summarize: "). `metrics` are computed besides
    chrF; each costs time on long texts.
    """

    max_target_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    prefix: str = ""
    metrics: tuple[Measure, ...] = ("exact_match", "token_f1", "rouge_l", "bleu")


@dataclass(frozen=True)
class TextToText(SequenceTask):
    """Text to text; the input is the job's prefix and the source."""

    name: str = "text-to-text"
    summary: str = "a text from a text: translation, summary; T5, BART, …; chrF, BLEU, ROUGE-L, exact match"
    primary_metric: str = "chrf"
    target: str = "target"
    options: TextToTextOptions = field(default_factory=TextToTextOptions)
    backbone: Backbone | None = None

    def configured(self, job: Job, backbone: Backbone) -> TextToText:
        return replace(self.with_options(job.task.options), backbone=backbone)

    @property
    def most(self) -> int:
        return self.options.max_target_tokens

    def with_options(self, options: Options) -> Self:
        return replace(self, options=options_of(options, TextToTextOptions))

    def records(self, options: Options) -> Schema:
        return PAIRS

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        """The source's pairs; for question sets, the question with its context is the source."""
        return super().from_builtin({split: _paired(table) for split, table in splits.items()}, job)

    def prompts(self, dataset: Dataset) -> Callable[[int], str]:
        sources, prefix = dataset["source"][:], self.options.prefix
        return lambda row: f"{prefix}{sources[row]}"

    def parse_input(self, text: str) -> Any:
        """The prefix followed by a source, from a text file or `text` itself.

        Raises:
            DataError: the file can't be read, or the text is empty.
        """
        return f"{self.options.prefix}{read_text_input(text)}"

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from atoll.tasks.text_to_text.metrics import MEASURES, ChrF

        return measured({"chrf": ChrF()} | {name: MEASURES[name]() for name in self.options.metrics})


def _paired(table: pa.Table) -> pa.Table:
    if "question" not in table.column_names:
        return table
    contexts = table.column("context").to_pylist() if "context" in table.column_names else [""] * len(table)
    sources = [prompt(*pair) for pair in zip(table.column("question").to_pylist(), contexts, strict=True)]
    rest = table.drop_columns([name for name in ("question", "context") if name in table.column_names])
    names = ["target" if name == "answer" else name for name in rest.column_names]
    return rest.rename_columns(names).append_column("source", pa.array(sources, pa.string()))


TEXT_TO_TEXT = TextToText()
