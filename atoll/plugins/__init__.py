"""Decorators that register other people's strategies, tasks, data sources, backbones and more by name.

A decorator registers one:

    from atoll import plugins

    @plugins.strategy("half-way", summary="half of the mean delta")
    class HalfWay: ...

The decorator runs when its module is imported; a file that `--plugin` names is imported before the job is
read. An installed package also lists its extensions as entry points, in the groups of `GROUPS`. They are
looked up at the first name that is not known yet, and a package is imported at the first use.

Every decorator takes the `name` that jobs use and a `summary` of one line for `atoll list` (by default the
docstring's first line). Where the job has a table of options for it, `options` is the pydantic model that
checks them (by default a class `Options` inside a decorated class); a task has that class and no `options`.
A decorator returns the decorated thing unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from atoll.errors import ConfigError
from atoll.plugins.plugin_files import PluginFile, files, load_file, load_files
from atoll.plugins.registry import (
    BACKBONE_PREFIX,
    BUILT_IN,
    GROUPS,
    Extension,
    Registry,
    Thing,
    brought,
    failure_of,
    in_one_line,
    registering,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "BACKBONE_PREFIX", "BUILT_IN", "GROUPS", "Extension", "PluginFile", "Registry", "augmentation",
    "backbone", "brought", "failure_of", "files", "in_one_line", "load_file", "load_files", "metric",
    "partition", "source", "strategy", "task",
]  # fmt: skip


def strategy(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a strategy: a class with `begin`, `plan` and `merge` (`atoll.strategies.Strategy`).

    A run creates it once, as `Class()`, or as `Class(options)` where it has an options model, with the job's
    `strategy.options`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("strategy", name, summary, options)


def task(name: str, *, summary: str = "") -> Callable[[Thing], Thing]:
    """Register a task: a class derived from `atoll.tasks.ModuleTask` or `Task`, created as `Class()`.

    The class checks its options itself, a `ModuleTask` by its class `Options`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("task", name, summary)


def partition(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a partition: a function that splits one source over simulated clients.

    It is called as `function(examples, clients, generator)`, with the job's `data.partition.options` as a
    fourth argument where it has an options model. `examples` is a table, ordered by the hash of its content:
    `examples["label"]` is a column as a list. `clients` is the number of clients, `generator` a
    `numpy.random.Generator` seeded by the job. It returns for each client a list or array of row numbers,
    from 0 to len(examples) - 1: at least one, none twice.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("partition", name, summary, options)


def metric(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a metric: a `torchmetrics.Metric` class, or a function that returns an instance of one.

    It is called as `thing(data_info)`, or `thing(data_info, options)` where it has an options model; the
    options are the table under its name in the job's `evaluate.metrics`. `data_info` is a dictionary of what
    all clients agree on, such as `data_info["classes"]`. Every state must be a tensor with
    `dist_reduce_fx="sum"`: clients send the states, which are added up before `compute`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("metric", name, summary, options)


def source(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a source of data: a function that a job names in `data.source`.

    It is called as `function(offline)`, with the job's `data.options` as a second argument where it has an
    options model. `offline` is the job's `backbone.offline`: where it is true nothing may be downloaded. It
    returns the path of a folder or file that the job's task can read, or a dictionary of tables: "train",
    and perhaps "test", each a `pyarrow.Table` or a dictionary from a column's name to a list, with the
    columns of a Parquet file of that task. Every process that needs the data calls it again, so it must
    return the same examples each time.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("source", name, summary, options)


def backbone(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a backbone: a class derived from `ImageBackbone`, `TextBackbone` or `SoundBackbone`.

    All three are in `atoll.backbones`. A job names it in `backbone.name`, with `plugin:` before the name. It
    is created as `Class()`, or as `Class(options)` where it has an options model, with the job's
    `backbone.options`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("backbone", name, summary, options)


def augmentation(
    name: str,
    *,
    summary: str = "",
    of: Literal["images", "texts", "sounds"] = "images",
    options: type[BaseModel] | None = None,
) -> Callable[[Thing], Thing]:
    """Register an augmentation: a function that varies an input at random, named in `train.augment`.

    It is called as `function(example, generator)`, with a third argument where it has an options model: the
    options are the table under its name in the job's `train.augment_options`. With `of="images"` it takes and
    returns an RGB `PIL.Image`, of the same size; with `of="texts"` a string, which must not become empty;
    with `of="sounds"` samples, a float32 tensor [n] of one channel at 16 kHz, of the same length.
    `generator` is a `torch.Generator` on the CPU: draw from it and from nothing else, and remember nothing
    between examples.

    Raises:
        ConfigError: the name is taken, or `of` is something else.
    """
    if of not in ("images", "texts", "sounds"):
        raise ConfigError(f"augmentation {name!r}: of: expected 'images', 'texts' or 'sounds', found {of!r}")
    return registering("augmentation", name, summary, options, of=of)
