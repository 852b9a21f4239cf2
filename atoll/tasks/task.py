"""The interface of a task: how data is read, which model is built, the loss and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from atoll.backbones.encoder import Batch, Encoder, Model
from atoll.data.dataset import Dataset
from atoll.data.shard import Shard
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import InfoField

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

    from atoll.backbones.resolve import Backbone
    from atoll.data.classification import Findings, Table


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, the text that the model generated for it, and the reference text in the data."""

    prompt: str
    written: str
    reference: str


class Task(Protocol):
    """One kind of learning problem: how its data is read, what is trained, the loss and the metrics.

    A task that `uses_pooled_features` trains a head on one row of features per example; these rows can be
    cached and all clients' heads trained at once. Such a task implements `encoder` and `head` and sets
    `head_loss`. Every other task implements `network`, which builds the whole model.

    >>> import torch
    >>> from atoll.tasks import task_named
    >>> task = task_named("text-classification")
    >>> task.primary_metric, task.uses_pooled_features
    ('accuracy', True)
    >>> task.loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # the mean over a batch, here of one
    tensor(0.6931)
    """

    name: str
    """The task's name in jobs (`task.name`)."""

    summary: str
    """One line for `atoll list tasks`."""

    uses_pooled_features: bool = True
    """Whether the head takes one row of features per example, [batch, width]."""

    sees_targets: bool = False
    """Whether the network takes the targets with a training batch, under `TARGETS`: earlier tokens, boxes."""

    compares_examples: bool = False
    """Whether loss and metrics compare examples with each other: a shard is then measured in one batch."""

    has_own_split: bool = False
    """Whether a client's data is split by the task's `split`, and not by hashes of the examples."""

    reads_times: bool = False
    """Whether a column of the data holds times, whose form `data.time_format` gives."""

    reads_pictures: bool = False
    """Whether inputs are pictures; `data.bits` and `data.window` then set how pixel values are scaled."""

    primary_metric: str = "accuracy"
    """The name, in `metrics`, of the metric that reports show first and that runs are compared by."""

    head_loss: Literal["softmax", "sigmoid", "squared"] = "softmax"
    """What `loss` is for heads: "softmax" cross_entropy, "sigmoid" binary_cross_entropy_with_logits,
    "squared" mse_loss."""

    inputs_description: str = ""
    """How inputs are preprocessed, for the first lines that a run prints; empty where nothing is printed."""

    info_fields: tuple[InfoField, ...] | None = None
    """The fields that `local_info` returns, and whose data each depends on; None where that is not declared.

    A class that overrides `local_info` must set `info_fields` too. Where the job promises privacy, uses a
    secure sum or meets a site with a privacy budget, it must state every field that isn't public, and
    `local_info` is called with no rows.
    """

    def info_fields_for(self, job: Job) -> Sequence[InfoField] | None:
        """The fields that `local_info` returns for this job; by default `info_fields`."""
        return self.info_fields

    def configured(self, job: Job, backbone: Backbone) -> Task:
        """The task set up for one job: its `task.options` are read here.

        All later calls, such as `shard`, `loss` and `metrics`, go to the object that this returns. `backbone`
        is the job's, with its weights located but not loaded.

        Raises:
            ConfigError: an option is unknown or has a bad value.
        """
        return self

    def with_data_info(self, data_info: DataInfo) -> Task:
        """The task, already `configured`, set up for what all clients agreed on (`merge_info`).

        For a task whose `loss` or `metric_inputs`, which are not given the data info, depend on it.
        """
        return self

    def check(self, job: Job) -> None:
        """Refuse a job that this task cannot do, before any data is read.

        Raises:
            ConfigError: the line names the job's key, its value and what was expected.
        """
        ...

    def takes_brought_backbone(self, job: Job) -> bool:
        """Whether an extension's backbone will do, which gives an example one row of features."""
        return self.uses_pooled_features

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        """One owner's data with every example checked, and how many examples were left out and why.

        `source` is a file or a folder, `data` the job's `[data]`, `options` its `task.options`.

        Raises:
            DataError: there is no data, or examples are bad: each is named, with its fault.
        """
        ...

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        """The data of a built-in source, by split (`train`, perhaps `test`), in this task's columns.

        Its tables already have the columns that `read` makes; they are trusted and not checked again.
        """
        ...

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        """Write rows into a new folder, in a layout that `read` with the same `data` reads back."""
        ...

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        """For `atoll check`: what the data holds and every fault in it, without raising for bad examples."""
        ...

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        """Further lines for `atoll check --backbone`, such as how many texts this backbone would cut off."""
        return ()

    def keys(self, dataset: Dataset) -> list[bytes]:
        """A 32-byte hash of each example's content, [n], that does not depend on its file or row number.

        Splits, order and caches go by these hashes.
        """
        ...

    def groups(self, dataset: Dataset) -> list[str] | None:
        """For each row the name of its group, such as its patient; None where examples stand alone.

        A group is never divided between training and test, nor between clients.
        """
        return None

    def split(
        self, shard: Shard, seed: int, fraction: float, *, helped: bool = True
    ) -> tuple[list[int], list[int]]:
        """(training rows, validation rows) of one client's shard, for a task that `has_own_split`.

        `seed` is the job's. A `fraction` below 1 is that of validation rows, from 1 on it is their number.
        With `helped` a small client may get at least one row of each kind; without it, a row's side must not
        depend on any other row, as example-level privacy requires.
        """
        raise TypeError(f"{self.name} splits by content alone")

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """What a model's shape depends on in one client's data, such as its classes, as JSON-able values."""
        ...

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows that agree with what the job states, such as a label in `data.classes`.

        Where a client may report nothing about its data, other rows are left out without a message.
        """
        return range(len(dataset))

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The clients' `local_info` merged into what holds for all of them, such as the union of classes.

        Raises:
            ConfigError: the clients' data cannot be trained on together.
        """
        ...

    def required_info(self) -> DataInfo:
        """Hashes of what must be the same at the server and all sites, by name: of a tokenizer, say."""
        return {}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        """The rows as inputs and targets, in the order of their hashes.

        `data_info` is what all clients agreed on (`merge_info`). `keys` are the rows' hashes, where the
        caller has them; otherwise they are computed.
        """
        ...

    def input_suffixes(self) -> tuple[str, ...]:
        """The suffixes, such as `.png`, of the files that `atoll predict` reads from a folder.

        Empty where inputs are not files.
        """
        return ()

    def parse_input(self, text: str) -> Any:
        """One argument of `atoll predict`, a text or a path, as an element of `Shard.inputs`.

        Raises:
            DataError: it cannot be read as an input of this task.
        """
        ...

    def parse_inputs(self, text: str) -> dict[str, Any]:
        """The inputs in one argument of `atoll predict`, by name, each as `parse_input` returns it.

        A file may hold several inputs, such as series or patients. A single input has the empty name.

        Raises:
            DataError: an input cannot be read.
        """
        return {"": self.parse_input(text)}

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        """The backbone, with its weights loaded, as an encoder of this task's inputs to [batch, width].

        Raises:
            ConfigError, WeightsError: this backbone does not fit the task, or its weights cannot be loaded.
        """
        raise TypeError(f"{self.name} has no encoder of its own, but a network")

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        """A new head from features [batch, width] to outputs [batch, …].

        Initial values are drawn from torch's global generator, which the caller has seeded.
        """
        raise TypeError(f"{self.name} has no head of its own, but a network")

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        """The whole model of a task that does not use pooled features; initial values follow `job.seed`.

        Raises:
            ConfigError, WeightsError: this backbone does not fit the task, or its weights cannot be loaded.
        """
        raise TypeError(f"{self.name} has a head on an encoder, and no network of its own")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The training loss: a scalar, the mean over the batch, of outputs and targets [batch, …]."""
        ...

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        """Fresh metrics; each state is a tensor with `dist_reduce_fx="sum"`, so that it sums over clients.

        Their `update` takes what `metric_inputs` returns.
        """
        ...

    def loss_weight(self, shard: Shard, rows: Sequence[int]) -> float:
        """How many terms `loss` averages over these rows: examples by default, tokens for language models.

        Where a batch is computed in parts, each part's loss is weighted by it.
        """
        return len(rows)

    def eval_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss that evaluation reports, a mean as in `loss`; it may differ from the training loss."""
        return self.loss(outputs, targets)

    def num_with_target(self, targets: torch.Tensor) -> int:
        """How many terms `eval_loss` averages over these targets; by default one per example."""
        return len(targets)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """The positional arguments of the metrics' `update`, of one batch's predictions and targets."""
        return predictions, targets

    def naive_baselines(self, shard: Shard, data_info: DataInfo) -> dict[str, Any]:
        """Predictions that need no training, by name, such as a series' last value; one per row of `shard`.

        A run reports their metrics beside the model's.
        """
        return {}

    def samples(self, model: Model, shard: Shard) -> list[Sample]:
        """Texts that the model writes for a few of a shard's examples, always for the same ones.

        Empty for tasks whose models write no text.
        """
        return []

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """A JSON-able table per prediction, as `atoll predict` prints it; its first key is `label`."""
        ...

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """The answer to each of `inputs`, for a task without pooled features; `batch` holds the same inputs.

        A table each, as `format_predictions` makes it; what is too large to print is a NumPy array in it.
        """
        return self.format_predictions(model.predict(batch), data_info)

    def files(
        self, answer: Mapping[str, Any], source: Any, data_info: DataInfo, *, overlay: bool
    ) -> dict[str, bytes]:
        """The files that `atoll predict --out` writes for an answer: their bytes, by how the names end.

        `source` is the input as `parse_input` returns it. With `overlay` there is also a picture of the input
        with the answer drawn on it, for tasks that can draw one.
        """
        return {}
