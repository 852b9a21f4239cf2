"""Speech recognition: transcribes recordings.

Loss: connectionist temporal classification (Graves et al. 2006), each transcript's loss divided by its number
of letters, then the mean over transcripts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import torch
from pydantic import Field
from torch import nn

from atoll.backbones.brought.names import SOUND_AUGMENTATIONS
from atoll.backbones.ctc_vocabulary import (
    ENGLISH_LETTERS,
    CtcVocabulary,
    code_points,
    from_code_points,
    has_letters,
    letters_of,
    normalize_transcript,
)
from atoll.backbones.encoder import Model
from atoll.backbones.options import check_augment, options_of
from atoll.backbones.resolve import Backbone
from atoll.data.audio import AUDIO_SUFFIXES, checked_sound
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import shown
from atoll.data.lazy import LazyColumn, LazyRows
from atoll.data.parsers import text_cell
from atoll.data.schema import FILE, Schema, SchemaField, file_bytes
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options, Positive, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import InfoField
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.speech.ctc_model import load_recogniser, real_counts

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""The target at padding after a transcript."""

MOST_LETTERS = 20_000
LETTERS = InfoField(
    "letters", "example", "task.options.letters", "the letters of the transcripts", "names", MOST_LETTERS
)
UNUSED_LETTERS = InfoField("letters", "public", holds="names", at_most=MOST_LETTERS)
"""The same field if the network brings its own letters: those of the data are then not used."""


class SpeechOptions(Section):
    """`task.options` of speech recognition: the longest recording in seconds, and the letters to write.

    `letters` are those of a new output layer, in any order; by default the English ones and all others in the
    clients' transcripts.
    """

    max_seconds: Positive = 20.0
    letters: Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)] | None = None


def recordings(options: SpeechOptions) -> Schema:
    """The schema of a table with one row per recording."""
    return Schema(
        (
            audio_role(options.max_seconds),
            SchemaField("transcript", _transcript, pa.string(), ("text", "sentence", "transcription")),
        )
    )


def audio_role(max_seconds: float) -> SchemaField:
    """The schema field of a recording of at most `max_seconds`; longer ones are errors."""

    def sound(data: Any, where: str) -> None:
        checked_sound(data, where, max_seconds)

    return SchemaField("audio", sound, FILE, ("file", "file_name", "path", "wav", "sound", "clip"), file=True)


def audio_inputs(dataset: Dataset, order: Sequence[int]) -> LazyRows:
    """The bytes of the recordings in the given rows, read lazily."""
    return LazyRows(LazyColumn(dataset, "audio", lambda cell: file_bytes(cell, "audio")), tuple(order))


def read_audio_input(text: str, max_seconds: float) -> bytes:
    """The bytes of a WAV or FLAC file of at most `max_seconds`.

    Raises:
        DataError: the file can't be read, or is too long.
    """
    data = file_bytes({"bytes": None, "path": text}, "audio")
    checked_sound(data, shown(text), max_seconds)
    return data


def _letters_in(transcripts: Iterable[str]) -> set[str]:
    """All letters of normalised transcripts."""
    return set().union(*transcripts)


def _info_of(letters: Iterable[str]) -> DataInfo:
    """The data info with these letters; empty if there are none, as in runs by older versions."""
    in_order = sorted(letters)
    return {"letters": in_order} if in_order else {}


def _transcript(cell: Any, where: str) -> str:
    text = text_cell(cell, where)
    if not normalize_transcript(text):
        raise DataError(f"{where}: {shown(repr(text[:40]))}, expected words")
    return text


@dataclass(frozen=True)
class SpeechRecognition(SchemaTask):
    """Speech recognition; targets are [n, longest]: the code points of each normalised transcript."""

    name: str = "speech-recognition"
    summary: str = "what was said; wav2vec2, HuBERT, Whisper's encoder, or a small one, with CTC; WER, CER"
    uses_pooled_features: bool = False
    primary_metric: str = "wer"
    options: SpeechOptions = field(default_factory=SpeechOptions)
    backbone: Backbone | None = None
    letters_of_data: tuple[str, ...] = ()

    def info_fields_for(self, job: Job) -> Sequence[InfoField]:
        """The letters of the transcripts, which a network with its own doesn't need."""
        return (UNUSED_LETTERS if has_letters(job.backbone) else LETTERS,)

    def configured(self, job: Job, backbone: Backbone) -> SpeechRecognition:
        return replace(self, options=options_of(job.task.options, SpeechOptions), backbone=backbone)

    def with_data_info(self, data_info: DataInfo) -> SpeechRecognition:
        return replace(self, letters_of_data=tuple(data_info.get("letters", ())))

    @cached_property
    def _letters(self) -> CtcVocabulary:
        assert self.backbone is not None, "the loss is asked of the task that is bound to a job"
        return letters_of(self.backbone, self.options.letters, self.letters_of_data)

    def check(self, job: Job) -> None:
        recordings(options_of(job.task.options, SpeechOptions)).check(job.data)
        check_augment(job, SOUND_AUGMENTATIONS)
        if job.privacy.unit in ("example", "both"):
            raise ConfigError(
                f"privacy.unit = {job.privacy.unit!r}: neither CTC nor a recurrent layer gives each example"
                " a gradient of its own in speech-recognition, expected 'none' or 'client'"
            )

    def records(self, options: Options) -> Schema:
        return recordings(options_of(options, SpeechOptions))

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        """A line about letters that the output layer lacks, or has only from the data, if any."""
        job_letters = options_of(options, SpeechOptions).letters
        table = self.read(source, data, options)
        transcripts = [
            normalize_transcript(text)
            for part in (table.train, table.test)
            if part is not None
            for text in part["transcript"]
        ]
        known, present = letters_of(backbone, job_letters), _letters_in(transcripts)
        lost = known.unwritten(transcripts)
        if lost and letters_of(backbone, job_letters, present) != known:
            others = "".join(sorted(present - known.numbers.keys()))
            return (
                f"letters besides the English ones: {others!r}; learnt where no privacy is promised, else"
                " task.options.letters has to name them",
            )
        return (lost,) if lost else ()

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The transcripts' letters besides the English ones, sorted; nothing where the job gives letters."""
        if options_of(options, SpeechOptions).letters is not None:
            return {}
        present = _letters_in(normalize_transcript(text) for text in dataset["transcript"])
        return _info_of(present - ENGLISH_LETTERS.numbers.keys())

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The sorted union of the clients' letters.

        Raises:
            ValueError: what a client calls a letter is more than one.
        """
        letters = {letter for info in data_info for letter in info.get("letters", ())}
        if long := [letter for letter in letters if len(letter) != 1]:
            raise ValueError(f"letters: expected single ones, found {min(long)[:40]!r}")
        return _info_of(letters)

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        transcripts = dataset["transcript"][:]
        written = [normalize_transcript(transcripts[place]) for place in order]
        if lost := self._letters.unwritten(written):
            logger.warning("%s (task.options.letters names those of a fresh layer)", lost)
        targets = code_points(written, IGNORE_INDEX)
        return Shard(audio_inputs(dataset, order), targets, tuple(keys[place] for place in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return AUDIO_SUFFIXES

    def parse_input(self, text: str) -> Any:
        """The bytes of a WAV or FLAC file."""
        return read_audio_input(text, self.options.max_seconds)

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        options = options_of(job.task.options, SpeechOptions)
        letters = letters_of(backbone, options.letters, data_info.get("letters", ()))
        return load_recogniser(backbone, job, letters, options.max_seconds)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        letters = [self._letters.coded(text) for text in from_code_points(targets)]
        lengths = torch.tensor([len(one) for one in letters])
        coded = torch.tensor([number for one in letters for number in one], dtype=torch.int64)
        # With padding, a transcript too long for its recording could be aligned with frames of padding.
        frames = real_counts(outputs, self._letters.blank)
        likelihoods = outputs.log_softmax(2).transpose(0, 1)
        each = nn.functional.ctc_loss(
            likelihoods, coded, frames, lengths, self._letters.blank, reduction="none", zero_infinity=True
        )
        return (each / lengths.clamp_min(1).to(each)).mean()

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection
        from torchmetrics.text import CharErrorRate, WordErrorRate

        return MetricCollection({"wer": WordErrorRate(), "cer": CharErrorRate()}, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(the recognised texts, the true transcripts)."""
        return predictions, from_code_points(targets)

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        return [{"label": text} for text in predictions]


SPEECH_RECOGNITION = SpeechRecognition()
