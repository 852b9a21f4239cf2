"""Intent and slots of what is said to a voice assistant, from its words, by one network with two heads.

Loss: cross-entropy of the intent, plus that of the tags, the mean over each sentence's own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import nn

from protocol.errors import ConfigError, DataError
from protocol.job import DataSection, Job, Options
from protocol.messages import Facts
from tasks.cells import name_cell, text_cell
from tasks.commands import load_command_model
from tasks.labelled import agreed, named
from tasks.lazy import Picked
from tasks.losses import surprise
from tasks.options import refuse_augment, refuse_options
from tasks.problems import Journal, shown
from tasks.reading import Table
from tasks.recorded import Recorded
from tasks.records import Records, Role
from tasks.seam import Model, Shard, canonical_order
from tasks.sources import SOURCES
from tasks.tables import Rows
from tasks.texts import read_text_input
from tasks.weights import Backbone

if TYPE_CHECKING:
    import datasets
    from torchmetrics import MetricCollection

NOTHING = -100
"""A target that isn't there: behind a short sentence, or a tag that no client knew."""

OUTSIDE = "O"


def _tags(cell: Any, where: str) -> str:
    """BIO tags with spaces between them."""
    if cell is None or cell == "":
        return ""
    tags = text_cell(cell, where).split()
    for tag in tags:
        if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
            raise DataError(f"{where}: slot tag {shown(repr(tag))}, expected O, B-name or I-name")
    return " ".join(tags)


@dataclass(frozen=True)
class _Sentences(Records):
    """Rows whose tags fit their words."""

    def canonical(self, rows: Rows, data: DataSection, journal: Journal) -> pa.Table:
        table = super().canonical(rows, data, journal)
        if "slots" not in table.column_names:
            return table
        kept = []
        texts, slots = (table.column(name).to_pylist() for name in ("text", "slots"))
        for place, (text, tags) in enumerate(zip(texts, slots, strict=True)):
            words, count = len(text.split()), len(tags.split())
            if count in (0, words):
                kept.append(place)
            else:
                told = f"{shown(repr(text[:40]))}: {count} slot tags for {words} words, expected one a word"
                journal.refuse(DataError(f"{shown(rows.folder)}: {told}"))
        return table.take(pa.array(kept, pa.int64()))


SENTENCES = _Sentences(
    (
        Role("text", text_cell, pa.string(), ("transcript", "utterance", "sentence")),
        Role("intent", name_cell, pa.string(), ("label",)),
        Role("slots", _tags, pa.string(), ("tags",), required=False),
    ),
    counted="intent",
)


@dataclass(frozen=True)
class Intent(Recorded):
    """Targets are [n, 1 + most words]: the intent, and a tag for each word."""

    name: str = "intent"
    summary: str = "what a sentence asks for, and its slots; any transformers encoder; accuracy, slot F1"
    on_features: bool = False
    headline: str = "intent_accuracy"

    def check(self, job: Job) -> None:
        refuse_options(job.task.options, "task.options", self.name)
        SENTENCES.check(job.data)
        refuse_augment(job)
        if job.privacy.units and job.data.source not in SOURCES:
            raise ConfigError(
                f"privacy.unit = {job.privacy.unit!r}: the slots' names would tell what clients hold,"
                " expected a built-in source"
            )

    def records(self, options: Options) -> Records:
        return SENTENCES

    def adopt(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return SENTENCES.adopted(
            {
                split: table.rename_columns(
                    ["text" if name == "transcript" else name for name in table.column_names]
                )
                for split, table in splits.items()
            }
        )

    def describe(self, dataset: datasets.Dataset, data: DataSection, options: Options) -> Facts:
        """The intents, those the job names or else those of the data, and the tags of the data, sorted.

        Raises:
            DataError: the data has an intent that the job doesn't name.
        """
        present = set(dataset["intent"])
        slots = dataset["slots"][:] if "slots" in dataset.column_names else []
        tags = sorted({tag for row in slots for tag in row.split()} | {OUTSIDE})
        return named(present, data, "intents", "intent") | {"tags": tags}

    def agree(self, facts: Sequence[Facts]) -> Facts:
        """Pinned intents as they are, else the sorted union; the sorted union of tags."""
        intents = agreed(facts, "intents")
        if len(intents) < 2:
            raise ConfigError(f"intent needs at least two intents, found {intents}")
        return {"intents": intents, "tags": sorted({tag for f in facts for tag in f["tags"]})}

    def shard(self, dataset: datasets.Dataset, facts: Facts, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        words = [text.split() for text in dataset["text"][:]]
        slots = dataset["slots"][:] if "slots" in dataset.column_names else [""] * len(words)
        intents, tags = ({name: n for n, name in enumerate(facts[key])} for key in ("intents", "tags"))
        given = dataset["intent"][:]
        targets = torch.full((len(order), 1 + max(map(len, words), default=0)), NOTHING)
        for row, place in zip(targets, order, strict=True):
            if given[place] not in intents:
                raise DataError(f"intent {given[place]!r} is not one of the run's {facts['intents']}")
            found = [tags.get(tag, NOTHING) for tag in slots[place].split()]
            row[0] = intents[given[place]]
            row[1 : 1 + len(found)] = torch.tensor(found, dtype=torch.int64)
        inputs = Picked(words.__getitem__, tuple(order))
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def raw_input(self, given: str) -> Any:
        """The words of a text file, or of the text itself."""
        return read_text_input(given).split()

    def network(self, backbone: Backbone, job: Job, facts: Facts) -> Model:
        return load_command_model(backbone, job, len(facts["intents"]), len(facts["tags"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        fitting = targets[:, : outputs.shape[1]]
        return surprise(outputs[:, :1], fitting[:, :1]) + surprise(outputs[:, 1:], fitting[:, 1:])

    def metrics(self, facts: Facts) -> MetricCollection:
        from torchmetrics import MetricCollection

        from tasks.metrics.commands import CommandSlotF1, IntentAccuracy

        return MetricCollection(
            {"intent_accuracy": IntentAccuracy(), "slot_f1": CommandSlotF1(facts["tags"])},
            compute_groups=False,
        )

    def measured(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """The best intent and tags as numbers; a batch is as long as its own longest sentence."""
        best = [scores.argmax(1).cpu() for scores in predictions]
        found = nn.utils.rnn.pad_sequence(best, batch_first=True)
        return found, targets[:, : found.shape[1]]

    def answer(self, predictions: Any, facts: Facts) -> list[dict[str, Any]]:
        """The intent, its probability, and a tag for each word."""
        rows = []
        for scores in (one.cpu() for one in predictions):
            chances = torch.softmax(scores[0, : len(facts["intents"])], dim=0)
            best = int(chances.argmax())
            tags = [facts["tags"][int(number)] for number in scores[1:].argmax(1)]
            rows.append(
                {
                    "label": facts["intents"][best],
                    "probability": round(float(chances[best]), 4),
                    "slots": " ".join(tags),
                }
            )
        return rows


INTENT = Intent()
