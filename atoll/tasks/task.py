"""The seam of a task: what is read, what is built, what is minimised, what is measured."""

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
from atoll.job.job import BackboneSection, DataSection, Job, Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.told import ToldField

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

    from atoll.backbones.resolve import Backbone
    from atoll.data.classification import Findings, Table


@dataclass(frozen=True)
class Sample:
    """What a model writes for a held-out prompt, beside what stands in the data."""

    prompt: str
    written: str
    reference: str


class Task(Protocol):
    """One kind of learning problem; a new one is a file and a line in the registry.

    Where it `uses_pooled_features`, its head sees one row of features an example, which may be kept and
    trained on at once: it says `encoder`, `head` and `head_loss`. Any other says `network`, the whole model.

    >>> import torch
    >>> from atoll.tasks import task_named
    >>> task = task_named("text-classification")
    >>> task.primary_metric, task.uses_pooled_features
    ('accuracy', True)
    >>> task.loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # the mean over a batch, here of one
    tensor(0.6931)
    """

    name: str
    """What jobs call it."""

    summary: str
    """One line for `atoll list tasks`."""

    uses_pooled_features: bool = True
    """Whether the head sees one row of features an example."""

    sees_targets: bool = False
    """Whether a batch to learn from holds the targets too (`TARGETS`): the words said so far, the boxes."""

    compares_examples: bool = False
    """Whether loss and metrics compare examples with one another: a shard is then measured in one batch."""

    has_own_split: bool = False
    """Whether `split` says what a client trains on and what it measures on."""

    reads_times: bool = False
    """Whether a column of its data holds times, which `data.time_format` may describe."""

    reads_pictures: bool = False
    """Whether its inputs are pictures, of which `data.bits` and `data.window` may say how they are seen."""

    primary_metric: str = "accuracy"
    """The metric that a run is judged by."""

    head_loss: Literal["softmax", "sigmoid", "squared"] = "softmax"
    """Which closed form `loss` has: cross_entropy, binary_cross_entropy_with_logits or mse_loss."""

    inputs_in_words: str = ""
    """What becomes of inputs before the network sees them, for a run's first lines, if that is told."""

    told: tuple[ToldField, ...] | None = None
    """The fields of `local_info`, each with whom it concerns; where it isn't said it counts as unknown.

    A class that has a `local_info` of its own says it anew. Under a promise, under a secure sum and at a site
    with a budget the job must give every field that isn't public, and `local_info` is asked of no rows.
    """

    def told_for(self, job: Job) -> Sequence[ToldField] | None:
        """The fields of `local_info` that this job makes clients tell."""
        return self.told

    def configured(self, job: Job, backbone: Backbone) -> Task:
        """This task as a job and its resolved backbone make it, above all by `task.options`.

        `loss`, `metrics` and `shard` are asked of what it returns.
        """
        return self

    def check(self, job: Job) -> None:
        """Raises ConfigError where the job asks for what there isn't for this task."""
        ...

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        """One owner's data, every example checked; `options` are the job's `task.options`."""
        ...

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        """The splits of a built-in source, which are in the task's own columns and trusted."""
        ...

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        """Write rows into a new folder, as `read` with the same `data` reads them back."""
        ...

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        """What is in the data and what is wrong with it, for `atoll check`."""
        ...

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        """What `atoll check --backbone` tells besides: how much of the data that backbone reads."""
        return ()

    def keys(self, dataset: Dataset) -> list[bytes]:
        """A 32-byte hash of each example's content: not of its path or place."""
        ...

    def groups(self, dataset: Dataset) -> list[str] | None:
        """What must not be split between training and test, or between clients: a patient, say."""
        return None

    def split(
        self, shard: Shard, seed: int, fraction: float, *, helped: bool = True
    ) -> tuple[list[int], list[int]]:
        """(rows to train on, rows to measure on) within a client, of a task that `has_own_split`.

        Unless a client is `helped` to have some of each, no row's side may depend on another row.
        """
        raise TypeError(f"{self.name} splits by content alone")

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """What must be known of the data before a model can be built."""
        ...

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The rows that are as the job says; others are left out where nothing may be told of them."""
        return range(len(dataset))

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The facts that hold for all clients together."""
        ...

    def required_info(self) -> DataInfo:
        """What this task, bound to a job, needs alike at server and sites, as hashes: a tokenizer, say."""
        return {}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        """Rows as inputs and targets, in canonical order; `keys` where they are known already."""
        ...

    def input_suffixes(self) -> tuple[str, ...]:
        """What the files end in that `atoll predict` takes from a folder; none where inputs are no files."""
        return ()

    def parse_input(self, given: str) -> Any:
        """One input of `atoll predict` as a shard holds it."""
        ...

    def parse_inputs(self, given: str) -> dict[str, Any]:
        """All that one argument of `atoll predict` holds, each as `parse_input` gives it, by name.

        The name is empty where there is one alone.
        """
        return {"": self.parse_input(given)}

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        """The backbone as an encoder of this task's inputs."""
        raise TypeError(f"{self.name} has no encoder of its own, but a network")

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        """A fresh head; its initial values come from the global generator."""
        raise TypeError(f"{self.name} has no head of its own, but a network")

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        """The whole model, where there are no pooled features; its first values come from the job's seed."""
        raise TypeError(f"{self.name} has a head on an encoder, and no network of its own")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        ...

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        """Metrics whose states add up over clients; they take predictions and targets."""
        ...

    def loss_weight(self, shard: Shard, rows: Sequence[int]) -> float:
        """Of how many things the loss of these rows is the mean: by that a part of a batch counts."""
        return len(rows)

    def eval_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss on examples that are only measured on, where that is another one."""
        return self.loss(outputs, targets)

    def num_with_target(self, targets: torch.Tensor) -> int:
        """How many examples the loss of a measurement is the mean of: those that have a target."""
        return len(targets)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """What `update` of the metrics takes."""
        return predictions, targets

    def naive_baselines(self, shard: Shard, data_info: DataInfo) -> dict[str, Any]:
        """Predictions that need no learning, by name, which a result always stands beside: the last value."""
        return {}

    def samples(self, model: Model, shard: Shard) -> list[Sample]:
        """What the model writes for a few of a shard's examples, always the same; none of most tasks."""
        return []

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """What `atoll predict` prints for each prediction; `label` comes first."""
        ...

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """What is said of each input, whose batch is that of `inputs`, by a task without pooled features.

        As `format_predictions`, and in arrays what is too large to print.
        """
        return self.format_predictions(model.predict(batch), data_info)

    def files(
        self, answer: Mapping[str, Any], given: Any, data_info: DataInfo, *, overlay: bool
    ) -> dict[str, bytes]:
        """What of an answer `atoll predict` writes as files: their content by their last names.

        `given` is the input as `parse_input` gives it; with an `overlay` also a picture that shows the
        answer on the input, where there is such a picture.
        """
        return {}
