"""Intent and slots of voice commands, predicted from their words by one network with two heads.

Loss: cross-entropy of the intent, plus that of the tags, the mean over each sentence's words. With
`task.options.input = "audio"` only the intent is predicted, directly from recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch
from torch import nn

from atoll.backbones.brought.names import SOUND_AUGMENTATIONS, is_brought
from atoll.backbones.encoder import Model
from atoll.backbones.options import check_augment, options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.audio import AUDIO_SUFFIXES
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.lazy import LazyRows
from atoll.data.parsers import name_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.shard import Shard, canonical_order
from atoll.data.tables import Rows
from atoll.data.texts import read_text_input
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options, Positive, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import agreed, class_fields, named, rows_named
from atoll.tasks.data_info import InfoField
from atoll.tasks.intent.audio_model import load_spoken_model
from atoll.tasks.intent.text_model import load_command_model
from atoll.tasks.losses import surprise
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.speech.task import audio_inputs, audio_role, read_audio_input

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

IGNORE_INDEX = -100
"""The target at padding after a sentence, and of a tag that isn't among the run's tags."""

OUTSIDE = "O"

TAGS = InfoField("tags", "example", "task.options.tags", "the list of slot tags", "names")
PUBLIC_TAGS = InfoField("tags", "public", holds="names")


class IntentOptions(Section):
    """`task.options` of intent: the kind of input, the longest recording in seconds, and the slot tags.

    Without `tags` the tags are those of the data; a tag of the data that isn't in `tags` is ignored.
    """

    input: Literal["text", "audio"] = "text"
    max_seconds: Positive = 20.0
    tags: tuple[str, ...] | None = None

    @property
    def is_heard(self) -> bool:
        """Whether inputs are recordings."""
        return self.input == "audio"


def _tags(cell: Any, where: str) -> str:
    """BIO tags separated by spaces; empty for an empty cell."""
    if cell is None or cell == "":
        return ""
    tags = text_cell(cell, where).split()
    for tag in tags:
        if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
            raise DataError(f"{where}: slot tag {shown(repr(tag))}, expected O, B-name or I-name")
    return " ".join(tags)


@dataclass(frozen=True)
class _Sentences(Schema):
    """A schema of sentences; rows with another number of tags than words are errors."""

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        table = _without(super().canonical(rows, data, diagnostics), "audio")
        if "slots" not in table.column_names:
            return table
        places = []
        texts, slots = (table.column(name).to_pylist() for name in ("text", "slots"))
        for place, (text, tags) in enumerate(zip(texts, slots, strict=True)):
            words, count = len(text.split()), len(tags.split())
            if count in (0, words):
                places.append(place)
            else:
                message = (
                    f"{shown(repr(text[:40]))}: {count} slot tags for {words} words, expected one a word"
                )
                diagnostics.error(DataError(f"{shown(rows.folder)}: {message}"))
        return table.take(pa.array(places, pa.int64()))


def _without(table: pa.Table, *names: str) -> pa.Table:
    """The table without the named columns, where it has them."""
    return table.drop_columns([name for name in table.column_names if name in names])


_TEXT = SchemaField("text", text_cell, pa.string(), ("transcript", "utterance", "sentence"))
_INTENT = SchemaField("intent", name_cell, pa.string(), ("label",))
_SLOTS = SchemaField("slots", _tags, pa.string(), ("tags",), required=False)

SENTENCES = _Sentences((_TEXT, _INTENT, _SLOTS), count_by="intent")


class _Recordings(Schema):
    """A schema of recordings; columns with words and slots are dropped."""

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        return _without(super().canonical(rows, data, diagnostics), "text", "slots")


def _records(options: IntentOptions) -> Schema:
    if options.is_heard:
        return _Recordings((audio_role(options.max_seconds), _INTENT), count_by="intent")
    return SENTENCES


EITHER = Schema((audio_role(IntentOptions().max_seconds), _TEXT, _INTENT, _SLOTS))
"""The fields of both kinds of examples, for hashing and writing them."""


@dataclass(frozen=True)
class Intent(SchemaTask):
    """Intent and slots; targets are [n, 1 + most words]: the intent, then each word's tag (not for audio)."""

    name: str = "intent"
    summary: str = "what is asked for, of words with slots or of recordings; intent accuracy, slot F1"
    uses_pooled_features: bool = False
    primary_metric: str = "intent_accuracy"
    options: IntentOptions = field(default_factory=IntentOptions)

    def configured(self, job: Job, backbone: Backbone) -> Intent:
        return replace(self, options=options_of(job.task.options, IntentOptions))

    def check(self, job: Job) -> None:
        options = options_of(job.task.options, IntentOptions)
        _records(options).check(job.data)
        if options.is_heard:
            check_augment(job, SOUND_AUGMENTATIONS)
            _check_privacy_of_recordings(job)
            return
        refuse_augment(job)

    def takes_brought_backbone(self, job: Job) -> bool:
        """Whether inputs are recordings: of a sentence every word needs features of its own."""
        return options_of(job.task.options, IntentOptions).is_heard

    def info_fields_for(self, job: Job) -> Sequence[InfoField]:
        """The fields of intents and of slot tags; with recordings the tags are public."""
        heard = options_of(job.task.options, IntentOptions).is_heard
        return (*class_fields("intents", "intents"), PUBLIC_TAGS if heard else TAGS)

    def records(self, options: Options) -> Schema:
        return _records(options_of(options, IntentOptions))

    def keys(self, dataset: Dataset) -> list[bytes]:
        return EITHER.keys(dataset)

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        EITHER.write(dataset, folder, data)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        options = options_of(job.task.options, IntentOptions)
        if options.is_heard:
            return EITHER.adopted(
                {split: _without(table, "text", "slots") for split, table in splits.items()}
            )
        texts = {split: _without(table, "audio") for split, table in splits.items()}
        return SENTENCES.adopted(
            {
                split: table.rename_columns(
                    ["text" if name == "transcript" else name for name in table.column_names]
                )
                for split, table in texts.items()
            }
        )

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The intents and the tags: those that the job names, else those of the data, sorted.

        Raises:
            DataError: the data has an intent that isn't in `data.classes`.
        """
        present = set(dataset["intent"])
        slots = dataset["slots"][:] if "slots" in dataset.column_names else []
        job_tags = options_of(options, IntentOptions).tags
        tags = {tag for row in slots for tag in row.split()} if job_tags is None else set(job_tags)
        return named(present, data, "intents", "intent") | {"tags": sorted(tags | {OUTSIDE})}

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose intent is in `data.classes`; all rows if that isn't set."""
        return rows_named(dataset["intent"][:], data)

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The intents of `data.classes`, else the sorted union of the clients'; the sorted union of tags.

        Raises:
            ConfigError: there are fewer than two intents.
        """
        intents = agreed(data_info, "intents")
        if len(intents) < 2:
            raise ConfigError(f"intent needs at least two intents, found {intents}")
        return {"intents": intents, "tags": sorted({tag for f in data_info for tag in f["tags"]})}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        heard = self.options.is_heard
        words = [[]] * len(order) if heard else [text.split() for text in dataset["text"][:]]
        slots = dataset["slots"][:] if "slots" in dataset.column_names else [""] * len(words)
        intents, tags = ({name: n for n, name in enumerate(data_info[key])} for key in ("intents", "tags"))
        intent_names = dataset["intent"][:]
        targets = torch.full((len(order), 1 + max(map(len, words), default=0)), IGNORE_INDEX)
        for row, place in zip(targets, order, strict=True):
            if intent_names[place] not in intents:
                raise DataError(
                    f"intent {intent_names[place]!r} is not one of the run's {data_info['intents']}"
                )
            tag_places = [tags.get(tag, IGNORE_INDEX) for tag in slots[place].split()]
            row[0] = intents[intent_names[place]]
            row[1 : 1 + len(tag_places)] = torch.tensor(tag_places, dtype=torch.int64)
        inputs = audio_inputs(dataset, order) if heard else LazyRows(words.__getitem__, tuple(order))
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return AUDIO_SUFFIXES if self.options.is_heard else (".txt",)

    def parse_input(self, text: str) -> Any:
        """The bytes of an audio file; for texts, the words in a text file or in `text` itself."""
        if self.options.is_heard:
            return read_audio_input(text, self.options.max_seconds)
        return read_text_input(text).split()

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        if self.options.is_heard:
            return load_spoken_model(backbone, job, len(data_info["intents"]), self.options.max_seconds)
        return load_command_model(backbone, job, len(data_info["intents"]), len(data_info["tags"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        fitting = targets[:, : outputs.shape[1]]
        intent = surprise(outputs[:, :1], fitting[:, :1])
        if self.options.is_heard:
            return intent
        return intent + surprise(outputs[:, 1:], fitting[:, 1:])

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import Metric, MetricCollection

        from atoll.tasks.intent.metrics import CommandSlotF1, IntentAccuracy

        metrics: dict[str, Metric | MetricCollection] = {"intent_accuracy": IntentAccuracy()}
        if not self.options.is_heard:
            metrics["slot_f1"] = CommandSlotF1(data_info["tags"])
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(predicted, true) intent and tags as numbers, both [n, 1 + words of the longest sentence]."""
        best = [scores.argmax(1).cpu() for scores in predictions]
        padded = nn.utils.rnn.pad_sequence(best, batch_first=True)
        return padded, targets[:, : padded.shape[1]]

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The intent, its probability, and, for texts, a tag for each word."""
        rows: list[dict[str, Any]] = []
        for scores in (one.cpu() for one in predictions):
            chances = torch.softmax(scores[0, : len(data_info["intents"])], dim=0)
            best = int(chances.argmax())
            intent = {"label": data_info["intents"][best], "probability": round(float(chances[best]), 4)}
            if not self.options.is_heard:
                tags = [data_info["tags"][int(number)] for number in scores[1:].argmax(1)]
                intent["slots"] = " ".join(tags)
            rows.append(intent)
        return rows


def _check_privacy_of_recordings(job: Job) -> None:
    if job.privacy.unit in ("example", "both") and not is_brought(job.backbone):
        raise ConfigError(
            f"privacy.unit = {job.privacy.unit!r}: a recurrent layer gives no example a gradient of its own"
            " in intent from recordings, expected 'none' or 'client'"
        )


INTENT = Intent()
