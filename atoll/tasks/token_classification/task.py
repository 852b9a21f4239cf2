"""Token classification: predicts a tag for each word of a sentence, from the state of its first subword.

Loss: cross-entropy of the tags, the mean over each sentence's words that the network reads, then over
sentences.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atoll.backbones.encoder import Batch, Model
from atoll.backbones.options import refuse_augment, refuse_options
from atoll.backbones.resolve import Backbone
from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyRows
from atoll.data.schema import Schema
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.errors import ConfigError, DataError
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import agreed, class_fields, named, pinned_names
from atoll.tasks.losses import surprise
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.token_classification.data import SENTENCES, words_cell
from atoll.tasks.token_classification.metrics import IGNORED, OUTSIDE, UNREAD, spans
from atoll.tasks.token_classification.model import load_tag_model
from atoll.tasks.token_classification.words import WordPieces, word_pieces

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenClassification(SchemaTask):
    """Token classification; targets are [n, most words], each word's tag, and -100 after a sentence's end."""

    info_fields = class_fields("tags", "tags")

    name: str = "token-classification"
    summary: str = "a tag for each word: names, places; any transformers encoder; entity F1 (seqeval's)"
    uses_pooled_features: bool = False
    primary_metric: str = "entity_f1"
    backbone: Backbone | None = None
    section: BackboneSection | None = None

    def configured(self, job: Job, backbone: Backbone) -> TokenClassification:
        return replace(self, backbone=backbone, section=job.backbone)

    @cached_property
    def _pieces(self) -> WordPieces:
        assert self.backbone is not None and self.section is not None, "asked of the task bound to a job"
        return word_pieces(self.backbone, self.section)

    def check(self, job: Job) -> None:
        refuse_options(job.task.options, "task.options", self.name)
        SENTENCES.check(job.data)
        refuse_augment(job)

    def records(self, options: Options) -> Schema:
        return SENTENCES

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        bound = replace(self, backbone=backbone, section=BackboneSection(name=backbone.name))
        table = self.read(source, data, options)
        sentences = [
            words for part in (table.train, table.test) if part is not None for words in part["tokens"]
        ]
        unread = bound.unread(sentences)
        return (unread,) if unread else (f"the network reads all {sum(map(len, sentences))} words",)

    def unread(self, sentences: Sequence[Sequence[str]]) -> str:
        """A line that says how many words the network doesn't read; empty if it reads all."""
        coded = self._pieces.coded(sentences)
        lost = [int((one["first"] < 0).sum()) for one in coded]
        if not sum(lost):
            return ""
        return (
            f"{sum(lost)} of {sum(map(len, sentences))} words, in {sum(map(bool, lost))} of"
            f" {len(sentences)} sentences, lie behind the {self._pieces.max_tokens} pieces that the network"
            " reads (backbone.max_tokens): they are not learnt, and count as tagged wrongly"
        )

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The tags: those of `data.classes` in its order, else those of the data, sorted.

        Raises:
            DataError: the data has a tag that isn't in `data.classes`.
        """
        return named({tag for tags in dataset["tags"] for tag in tags}, data, "tags", "tag")

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose tags are all in `data.classes`; all rows if that isn't set."""
        known = set(pinned_names(data))
        tags = dataset["tags"][:]
        return [row for row in range(len(dataset)) if data.classes is None or known.issuperset(tags[row])]

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The tags of `data.classes`, else the sorted union of the clients' tags.

        Raises:
            ConfigError: there are fewer than two tags.
        """
        tags = agreed(data_info, "tags")
        if len(tags) < 2:
            raise ConfigError(f"{self.name} needs at least two tags, found {tags}")
        return {"tags": tags}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        words, tags = dataset["tokens"][:], dataset["tags"][:]
        if unread := self.unread(words) if words else "":
            logger.warning("%s", unread)
        numbers = {name: n for n, name in enumerate(data_info["tags"])}
        targets = torch.full((len(order), max(map(len, words), default=0)), IGNORED)
        for row, place in zip(targets, order, strict=True):
            if unknown := [tag for tag in tags[place] if tag not in numbers]:
                raise DataError(
                    f"tag {unknown[0]!r} is not one of the run's {data_info['tags']}; data.classes can name"
                    " them all"
                )
            row[: len(tags[place])] = torch.tensor([numbers[tag] for tag in tags[place]])
        inputs = LazyRows(words.__getitem__, tuple(order))
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return (".txt",)

    def parse_input(self, text: str) -> Any:
        """The words in a text file or in `text` itself, separated by spaces or as a JSON list.

        Raises:
            DataError: the file can't be read, or there is no word.
        """
        return words_cell(read_text_input(text), f"input {text[:40]!r}")

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_tag_model(backbone, job, len(data_info["tags"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        fitting = targets[:, : outputs.shape[1]]
        return surprise(outputs[:, :, :-1], fitting.masked_fill(outputs[:, :, -1] == 0, IGNORED))

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import Metric, MetricCollection

        from atoll.tasks.token_classification.metrics import (
            EntityF1,
            EntityPrecision,
            EntityRecall,
            TagAccuracy,
        )

        tags = data_info["tags"]
        metrics: dict[str, Metric | MetricCollection] = {
            "entity_f1": EntityF1(tags),
            "entity_precision": EntityPrecision(tags),
            "entity_recall": EntityRecall(tags),
            "token_accuracy": TagAccuracy(),
        }
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(predicted tag ids, true tag ids), both [n, words of the longest sentence]."""
        padded = nn.utils.rnn.pad_sequence(
            [_best(scores) for scores in predictions], batch_first=True, padding_value=UNREAD
        )
        return padded, targets[:, : padded.shape[1]]

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """A tag for each word, null for words that weren't read, and the entities with their word indices."""
        return [_answer(_named(_best(scores), data_info)) for scores in predictions]

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """As `format_predictions`, with the words and each entity's text; `label` lists the entities."""
        answers = self.format_predictions(model.predict(batch), data_info)
        return [_with_words(answer, words) for answer, words in zip(answers, inputs, strict=True)]


def _best(scores: torch.Tensor) -> torch.Tensor:
    """The most likely tag of each word, [words], and -1 for words that weren't read."""
    best = scores[:, :-1].argmax(1)
    return best.masked_fill(scores[:, -1] == 0, UNREAD).cpu()


def _named(tags: torch.Tensor, data_info: DataInfo) -> list[str | None]:
    return [None if tag == UNREAD else data_info["tags"][tag] for tag in tags.tolist()]


def _answer(tags: list[str | None]) -> dict[str, Any]:
    entity_spans = spans([tag or OUTSIDE for tag in tags])
    entities = [{"name": name, "first": first, "last": last} for name, first, last in entity_spans]
    return {"label": " ".join(tag or "?" for tag in tags), "tags": tags, "entities": entities}


def _with_words(answer: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    entities = [one | {"text": " ".join(words[one["first"] : one["last"] + 1])} for one in answer["entities"]]
    label = ", ".join(f"{one['text']} ({one['name']})" for one in entities)
    return {"label": label or "no entity", "words": list(words), "tags": answer["tags"], "entities": entities}


TOKEN_CLASSIFICATION = TokenClassification()
