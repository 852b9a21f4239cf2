"""The base of a task on a network of one's own: rows of a table in, a torch module, a loss, metrics.

`docs/extend.md` has a whole example. Data is a CSV, TSV, JSON Lines or Parquet file (or a folder with `train`
and `test`) whose columns are declared; every row is checked, and all faults are told at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.encoder import Batch, Encoder, Model
from atoll.backbones.options import refuse_augment, refuse_options
from atoll.backbones.resolve import NETWORK, Backbone
from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyRows
from atoll.data.parsers import list_cell, name_cell, number_cell, text_cell
from atoll.data.schema import Schema, SchemaField
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.extension_options import validated
from atoll.job.job import DataSection, Job
from atoll.job.job import Options as Given
from atoll.protocol.messages import DataInfo
from atoll.protocol.random_streams import global_stream
from atoll.tasks.classes import Labelled, named, names_told, rows_named
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.told import ToldField

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torchmetrics import MetricCollection

    from atoll.tasks.task import Task


@dataclass(frozen=True)
class Column:
    """How the cells of a column are read, and how they are kept."""

    read: Callable[[Any, str], Any]
    """(cell, place) to its value; raises DataError, whose text starts with the place, for a bad cell."""
    kind: pa.DataType


NUMBER = Column(number_cell, pa.float64())
"""A finite number, as a Python float."""
NUMBERS = Column(list_cell(number_cell), pa.list_(pa.float64()))
"""A list of finite numbers, such as `[1, 2.5]`."""
TEXT = Column(text_cell, pa.string())
"""A text that isn't empty."""
NAME = Column(name_cell, pa.string())
"""A name, or a whole number, as text: a class, an identifier."""


class ModuleTask(SchemaTask, Labelled):
    """Derive from it, say `columns`, `input` and `module`, and what is learnt of a row.

    What is learnt is a class where `label` names the column that holds it: targets, loss (cross-entropy),
    metrics (accuracy, macro F1) and answers are then there. Otherwise say `target`, `loss`, `metrics` and,
    for `atoll predict`, `format_predictions`.

    A job names it in `task.name`, and `backbone = { name = "task:network", weights = "random" }`; with
    `tune.method = "full"` the whole module is trained.
    """

    name = ""
    summary = ""
    uses_pooled_features = False
    primary_metric = "accuracy"

    columns: ClassVar[Mapping[str, Column]] = {}
    """The data's columns by name, and how each is read."""

    label: ClassVar[str | None] = None
    """The column that holds an example's class, if classes are learnt."""

    Options: ClassVar[type[BaseModel] | None] = None
    """A pydantic model of the job's `task.options`, if there are any; `self.options` is then one of it."""

    options: Any = None

    def input(self, row: Mapping[str, Any]) -> torch.Tensor | dict[str, torch.Tensor]:
        """A row's input, without a dimension for the batch: of the same shape for every row.

        `row` has each column's value, but for the label's. A dictionary of tensors is given to the module by
        name: `module(**batch)`; a single tensor as `module(batch)`, [batch, …].
        """
        raise NotImplementedError(f"{type(self).__name__}.input")

    def module(self, data_info: DataInfo) -> nn.Module:
        """The network, with fresh weights drawn from torch's global generator, which is seeded for it.

        `facts["classes"]` are the classes, in order, where `label` is said. An example's output must not
        depend on the others in its batch (no batch norm in training).
        """
        raise NotImplementedError(f"{type(self).__name__}.module")

    def target(self, row: Mapping[str, Any], data_info: DataInfo) -> torch.Tensor:
        """What is to be predicted of a row, where that is no class: of the same shape for every row."""
        raise NotImplementedError(f"{type(self).__name__}.target, or say which column is the label")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch: one number, of the module's outputs and the targets, both [batch, …]."""
        self._of_classes("loss")
        return super().loss(outputs, targets)

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        """A `torchmetrics.MetricCollection`, whose states are tensors that sum over clients."""
        self._of_classes("metrics")
        return super().metrics(data_info)

    def format_predictions(self, predictions: torch.Tensor, data_info: DataInfo) -> list[dict[str, Any]]:
        """What `atoll predict` prints for each of the outputs [n, …]; `label` comes first."""
        if self.label is not None:
            return super().format_predictions(predictions, data_info)
        return [{"label": ", ".join(f"{v:.6g}" for v in row.flatten().tolist())} for row in predictions]

    def _of_classes(self, method: str) -> None:
        if self.label is None:
            raise NotImplementedError(f"{type(self).__name__}.{method}, or say which column is the label")

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        raise TypeError(f"{self.name} has a module of its own, and no head on features")

    def last_layer(self, module: nn.Module) -> nn.Module:
        """What `tune.method = "head"` trains: unless said, the module's last layer that has weights."""
        return [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None][-1]

    def configured(self, job: Job, backbone: Backbone) -> Task:
        bound = copy.copy(self)
        bound.options = self._options_of(job.task.options)
        return bound

    def _options_of(self, given: Given) -> Any:
        if self.Options is None:
            refuse_options(given, "task.options", self.name)
            return None
        return validated(self.Options, given, "task.options")

    def check(self, job: Job) -> None:
        self._options_of(job.task.options)
        refuse_options(job.backbone.options, "backbone.options", self.name)
        refuse_augment(job)
        if job.backbone.name != NETWORK:
            raise ConfigError(
                f"backbone.name: {self.name} builds its network itself, expected {NETWORK!r},"
                f" found {job.backbone.name!r}"
            )

    def records(self, options: Given) -> Schema:
        roles = tuple(SchemaField(name, column.read, column.kind) for name, column in self.columns.items())
        return Schema(roles, count_by=self.label)

    def local_info(self, dataset: Dataset, data: DataSection, options: Given) -> DataInfo:
        if self.label is None:
            return {}
        return named(set(dataset[self.label]), data, "classes", self.label)

    def told_for(self, job: Job) -> Sequence[ToldField] | None:
        """The classes, where they are learnt; a task with a `local_info` of its own says `told` itself."""
        if "told" in vars(type(self)):
            return self.told
        return () if self.label is None else names_told()

    def fits(self, dataset: Dataset, data: DataSection, options: Given) -> Sequence[int]:
        return range(len(dataset)) if self.label is None else rows_named(dataset[self.label][:], data)

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {} if self.label is None else super().merge_info(data_info)

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        cells = {name: dataset[name] for name in self.columns if name in dataset.column_names}
        inputs = LazyRows(
            lambda row: {name: column[row] for name, column in cells.items() if name != self.label},
            tuple(order),
        )
        if self.label is not None:
            targets = self.targets(cells[self.label], order, data_info)
        else:
            rows = ({name: column[row] for name, column in cells.items()} for row in order)
            targets = torch.stack([self.target(row, data_info) for row in rows])
        return Shard(inputs, targets, tuple(keys[row] for row in order))

    def parse_input(self, given: str) -> Any:
        """A row as JSON, such as `{"height": 1.8}`.

        Raises:
            DataError: it is none, or a cell of it is bad; columns that are left out are not looked at.
        """
        try:
            row = json.loads(given)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f'{given[:40]!r}: expected a row as JSON, such as {{"column": 1}}')
        return {name: c.read(row[name], name) for name, c in self.columns.items() if name in row}

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        if backbone.kind != "task":
            raise WeightsError(f"backbone.name: expected {NETWORK!r} for {self.name}")
        with global_stream(job.seed, "init", "backbone"):
            module = self.module(data_info)
        if backbone.weights is not None:
            load_state_dict_strict(module, load_weights(backbone.weights), backbone.weights)
        return _ModuleModel(_Rows(module, self.input), self.last_layer(module))


class _Rows(Encoder):
    """Rows to what the module gives."""

    def __init__(self, module: nn.Module, tensor_of: Callable[[Any], torch.Tensor | Batch]) -> None:
        super().__init__()
        self.model = module
        self.width = 0
        self._tensor_of = tensor_of

    def preprocess(self, inputs: Sequence[Any]) -> list[torch.Tensor | Batch]:
        return [self._tensor_of(row) for row in inputs]

    def collate(self, ready: Sequence[torch.Tensor | Batch]) -> Batch:
        rows = [{ONLY: one} if isinstance(one, torch.Tensor) else one for one in ready]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def forward(self, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = self.model(batch[ONLY]) if ONLY in batch else self.model(**batch)
        return outputs


ONLY = "only input"
"""The name of a row's input that is a single tensor."""


class _ModuleModel(Model):
    """The module's outputs are the model's."""

    def forward(self, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = self.backbone(batch)
        return outputs
