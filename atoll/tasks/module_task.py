"""The base class of a task that brings its own network: it maps rows of a table to a torch module's inputs.

`docs/extend.md` has a whole example. Data is a CSV, TSV, JSON Lines or Parquet file (or a folder with `train`
and `test`) whose columns are declared; every row is checked, and all faults are listed together.
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
from atoll.data.audio import checked_sound
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import shown
from atoll.data.images import decode_image, seen_picture
from atoll.data.lazy import LazyRows
from atoll.data.parsers import list_cell, name_cell, number_cell, text_cell
from atoll.data.schema import FILE, Picture, Schema, SchemaField, file_bytes
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.extension_options import validated
from atoll.job.job import DataSection, Job
from atoll.job.section import Options as Given
from atoll.protocol.messages import DataInfo
from atoll.protocol.random_streams import global_stream
from atoll.tasks.classes import Labelled, class_fields, named, rows_named
from atoll.tasks.data_info import InfoField
from atoll.tasks.schema_task import SchemaTask

if TYPE_CHECKING:
    from PIL import Image
    from pydantic import BaseModel
    from torchmetrics import MetricCollection

    from atoll.tasks.task import Task


@dataclass(frozen=True)
class Column:
    """How the cells of a column are parsed, and the Arrow type in which they are stored."""

    read: Callable[[Any, str], Any]
    """(cell, place) to the cell's value; a bad cell raises DataError, whose text begins with `place`."""
    kind: pa.DataType
    value: Callable[[bytes], Any] | None = None
    """Of a column of files: what `row` has of a file's bytes, which `read` has found to be good."""
    picture: Picture | None = None
    """Of a column of pictures: what checks their bytes instead of `read`, and remarks what decoding loses."""

    def of_cell(self, cell: Any) -> Any:
        """What `row` has of a stored cell: of a file what it holds, else the cell itself."""
        return cell if self.value is None else self.value(file_bytes(cell, "file"))


def _whole_sound(data: bytes, where: str) -> None:
    checked_sound(data, where, LONGEST_SECONDS, key="")


def _samples(data: bytes) -> torch.Tensor:
    return torch.from_numpy(checked_sound(data, "sound", LONGEST_SECONDS, key=""))


def _whole_picture(data: bytes, where: str) -> None:
    decode_image(data, where)


def _picture(data: bytes) -> Image.Image:
    return decode_image(data, "image", verify=False)


LONGEST_SECONDS = 600.0
"""The longest recording that a column of sounds takes."""

NUMBER = Column(number_cell, pa.float64())
"""A finite number, as a Python float."""
NUMBERS = Column(list_cell(number_cell), pa.list_(pa.float64()))
"""A list of finite numbers, such as `[1, 2.5]`."""
TEXT = Column(text_cell, pa.string())
"""A text that isn't empty."""
NAME = Column(name_cell, pa.string())
"""A name, or a whole number, as text: a class, an identifier."""
SOUND = Column(_whole_sound, FILE, _samples)
"""A WAV or FLAC file of at most ten minutes, as float32 samples [n] of one channel at 16 kHz."""
IMAGE = Column(_whole_picture, FILE, _picture, seen_picture)
"""An image file, as an RGB `PIL.Image`."""


class ModuleTask(SchemaTask, Labelled):
    """A task on your own `nn.Module`: derive from it, set `columns`, and write `input` and `module`.

    To learn classes, set `label` to the column that holds them: targets, loss (cross-entropy), metrics
    (accuracy, macro F1) and answers then come with this class. To learn anything else, write `target`, `loss`
    and `metrics`, and `format_predictions` for `atoll predict`.

    A job names it in `task.name`, and `backbone = { name = "task:network", weights = "random" }`; with
    `tune.method = "full"` the whole module is trained.
    """

    name = ""
    summary = ""
    uses_pooled_features = False
    primary_metric = "accuracy"

    columns: ClassVar[Mapping[str, Column]] = {}
    """The data's columns by name.

    Each is `NUMBER`, `NUMBERS`, `TEXT`, `NAME`, `SOUND`, `IMAGE` or your own `Column`. In a table, a file is
    its path beside the table, or its bytes (Parquet).
    """

    label: ClassVar[str | None] = None
    """The column that holds an example's class; None where no classes are learnt."""

    Options: ClassVar[type[BaseModel] | None] = None
    """The pydantic model that checks the job's `task.options`; `self.options` is then an instance of it."""

    options: Any = None

    def input(self, row: Mapping[str, Any]) -> torch.Tensor | dict[str, torch.Tensor]:
        """One row's input to the network, without a batch dimension; the same shape and dtype for every row.

        `row` maps each column but the label's to its value. Stacked to [batch, …], a tensor is passed as
        `module(batch)`, a dictionary of tensors by name as `module(**batch)`.
        """
        raise NotImplementedError(f"{type(self).__name__}.input")

    def module(self, data_info: DataInfo) -> nn.Module:
        """A new network from inputs [batch, …] to outputs [batch, …]; with `label`, one logit per class.

        Initial weights are drawn from torch's global generator, which Atoll seeds before the call. With
        `label`, `data_info["classes"]` lists the classes in the order of the outputs. An example's output
        must not depend on the others in its batch, so no batch norm in training.
        """
        raise NotImplementedError(f"{type(self).__name__}.module")

    def target(self, row: Mapping[str, Any], data_info: DataInfo) -> torch.Tensor:
        """What to predict for one row, where it is not a class; the same shape and dtype for every row.

        `row` maps every column to its value. Targets reach `loss` stacked to [batch, …].
        """
        raise NotImplementedError(f"{type(self).__name__}.target, or say which column is the label")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, a scalar; the network's outputs and the targets are both [batch, …]."""
        self._of_classes("loss")
        return super().loss(outputs, targets)

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        """A `torchmetrics.MetricCollection` whose states are tensors with `dist_reduce_fx="sum"`.

        Clients send the states, which are added up before `compute`. `update` takes (outputs, targets).
        """
        self._of_classes("metrics")
        return super().metrics(data_info)

    def format_predictions(self, predictions: torch.Tensor, data_info: DataInfo) -> list[dict[str, Any]]:
        """A JSON-able table for each row of outputs [n, …], as `atoll predict` prints it; first `label`."""
        if self.label is not None:
            return super().format_predictions(predictions, data_info)
        return [{"label": ", ".join(f"{v:.6g}" for v in row.flatten().tolist())} for row in predictions]

    def _of_classes(self, method: str) -> None:
        if self.label is None:
            raise NotImplementedError(f"{type(self).__name__}.{method}, or say which column is the label")

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        raise TypeError(f"{self.name} has a module of its own, and no head on features")

    def last_layer(self, module: nn.Module) -> nn.Module:
        """The layer that `tune.method = "head"` trains: by default the module's last one with weights."""
        return [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None][-1]

    def configured(self, job: Job, backbone: Backbone) -> Task:
        bound = copy.copy(self)
        bound.options = self._options_of(job.task.options)
        return bound

    def _options_of(self, options: Given) -> Any:
        if self.Options is None:
            refuse_options(options, "task.options", self.name)
            return None
        return validated(self.Options, options, "task.options")

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
        roles = (
            SchemaField(name, c.read, c.kind, file=c.value is not None, picture=c.picture)
            for name, c in self.columns.items()
        )
        return Schema(tuple(roles), count_by=self.label)

    def local_info(self, dataset: Dataset, data: DataSection, options: Given) -> DataInfo:
        if self.label is None:
            return {}
        return named(set(dataset[self.label]), data, "classes", self.label)

    def info_fields_for(self, job: Job) -> Sequence[InfoField] | None:
        """The field of the classes where `label` is set; a subclass may set `info_fields` instead."""
        if "info_fields" in vars(type(self)):
            return self.info_fields
        return () if self.label is None else class_fields()

    def fits(self, dataset: Dataset, data: DataSection, options: Given) -> Sequence[int]:
        return range(len(dataset)) if self.label is None else rows_named(dataset[self.label][:], data)

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {} if self.label is None else super().merge_info(data_info)

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        cells = {name: dataset[name] for name in self.columns if name in dataset.column_names}

        def values_of(row: int, without: str | None = None) -> dict[str, Any]:
            return {
                name: self.columns[name].of_cell(cell[row]) for name, cell in cells.items() if name != without
            }

        inputs = LazyRows(lambda row: values_of(row, self.label), tuple(order))
        if self.label is not None:
            targets = self.targets(cells[self.label], order, data_info)
        else:
            targets = torch.stack([self.target(values_of(row), data_info) for row in order])
        return Shard(inputs, targets, tuple(keys[row] for row in order))

    def parse_input(self, text: str) -> Any:
        """A row as JSON, such as `{"height": 1.8}`, with the paths of files; columns may be left out.

        Raises:
            DataError: it is not a JSON object, or a cell is bad.
        """
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f'{text[:40]!r}: expected a row as JSON, such as {{"column": 1}}')
        return {name: _input_value(c, row[name], name) for name, c in self.columns.items() if name in row}

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        if backbone.kind != "task":
            raise WeightsError(f"backbone.name: expected {NETWORK!r} for {self.name}")
        with global_stream(job.seed, "init", "backbone"):
            module = self.module(data_info)
        if backbone.weights is not None:
            load_state_dict_strict(module, load_weights(backbone.weights), backbone.weights)
        return _ModuleModel(_Rows(module, self.input), self.last_layer(module))


def _input_value(column: Column, cell: Any, name: str) -> Any:
    """The value of a cell of a row that `atoll predict` is given; a file by its path."""
    if column.value is None:
        return column.read(cell, name)
    path = text_cell(cell, name)
    data = file_bytes({"bytes": None, "path": path}, name)
    column.read(data, shown(path))
    return column.value(data)


class _Rows(Encoder):
    """The task's module as an encoder: rows in, the module's outputs out."""

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
"""The name, in a batch, of an input that is a single tensor."""


class _ModuleModel(Model):
    """A model whose outputs are those of the task's module."""

    def forward(self, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = self.backbone(batch)
        return outputs
