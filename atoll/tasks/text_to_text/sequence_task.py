"""The base class of tasks whose answer is a generated text: targets as tokens, network and loss.

Loss: cross-entropy of the target's next token, the mean over each target's tokens, then over examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from atoll.backbones.encoder import Model
from atoll.backbones.options import refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyRows
from atoll.data.shard import Shard, canonical_order
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.losses import surprise
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.text_to_text.seq2seq import answer_tokenizer, load_answerer

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

IGNORE_INDEX = -100
"""The target at padding after an answer."""


class SequenceTask(SchemaTask):
    """A task that generates text; targets are [n, most + bytes]: up to `most` tokens, then the UTF-8 text."""

    info_fields = ()

    uses_pooled_features = False
    sees_targets = True
    backbone: Backbone | None
    target: str
    """The name of the target column."""

    @property
    def most(self) -> int:
        """The most tokens of a target."""
        raise NotImplementedError

    def with_options(self, options: Options) -> Self:
        """This task with the given `task.options`.

        Raises:
            ConfigError: an option is unknown, or its value is invalid.
        """
        raise NotImplementedError

    def prompts(self, dataset: Dataset) -> Callable[[int], str]:
        """A function from a row's number to the network's input text."""
        raise NotImplementedError

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.backbone is not None, "a shard is asked of the task that is bound to a job"
        return answer_tokenizer(self.backbone)

    def check(self, job: Job) -> None:
        self.with_options(job.task.options)
        self.records(job.task.options).check(job.data)
        refuse_augment(job)

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        return {}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        texts = dataset[self.target][:]
        inputs = LazyRows(self.prompts(dataset), tuple(order))
        targets = self.targets([texts[place] for place in order])
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def targets(self, texts: Sequence[str]) -> torch.Tensor:
        """The targets [n, most + bytes]: tokens to train on (cut at `most`), and the text for metrics."""
        most = self.most
        tokens = self._tokenizer(text_target=list(texts), truncation=True, max_length=most)["input_ids"]
        coded = [list(text.encode()) for text in texts]
        table = torch.full((len(texts), most + max(map(len, coded), default=0)), IGNORE_INDEX)
        for row, known, text in zip(table, tokens, coded, strict=True):
            row[: len(known)] = torch.tensor(known)
            row[most : most + len(text)] = torch.tensor(text)
        return table

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        """Lines about how many inputs and targets are longer than the network reads and writes."""
        table = self.read(source, data, options)
        parts = [part for part in (table.train, table.test) if part is not None]
        bound, tokenizer = self.with_options(options), answer_tokenizer(backbone)
        read = min(BackboneSection(name=backbone.name).max_tokens, tokenizer.model_max_length)
        prompts = [prompt for part in parts for prompt in map(bound.prompts(part), range(len(part)))]
        texts = [text for part in parts for text in part[self.target][:]]
        long = sum(len(ids) > read for ids in tokenizer(prompts)["input_ids"])
        cut = sum(len(ids) > bound.most for ids in tokenizer(text_target=texts)["input_ids"])
        return (
            f"{long} of {len(prompts)} inputs are longer than {read} tokens (backbone.max_tokens) and are"
            " cut",
            f"{cut} of {len(texts)} targets are longer than {bound.most} tokens: what follows is not learnt",
        )

    def input_suffixes(self) -> tuple[str, ...]:
        return (".txt",)

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_answerer(
            backbone, job, answer_tokenizer(backbone), self.with_options(job.task.options).most
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return surprise(outputs, targets[:, : outputs.shape[1]])

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(the generated texts, the true texts)."""
        texts = targets[:, self.most :].tolist()
        return predictions, [bytes(b for b in text if b >= 0).decode() for text in texts]

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        return [{"label": text} for text in predictions]


def measured(metrics: dict[str, Any]) -> MetricCollection:
    """A collection of these metrics in which no two share states."""
    from torchmetrics import MetricCollection

    return MetricCollection(metrics, compute_groups=False)
