"""Strategies, tasks, data sources, backbones and more that other people's code brings, each by its name.

A decorator registers one:

    from atoll import plugins

    @plugins.strategy("half-way", summary="half of the mean delta")
    class HalfWay: ...

It runs when the module is imported: a file that `--plugin` names is imported before the job is read. An
installed package lists what it brings as entry points too, in the groups that `GROUPS` names; these are
looked up when a name is asked for that isn't known yet, and a package is imported when it is used.
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

    It is made once a run, as `Class()`, or `Class(options)` where it declares options: a pydantic model
    given here, or a class `Options` inside it. They are the job's `strategy.options`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("strategy", name, summary, options)


def task(name: str, *, summary: str = "", options: type[BaseModel] | None = None) -> Callable[[Thing], Thing]:
    """Register a task: a class that derives from `atoll.tasks.ModuleTask` or `Task`; it is made as `Class()`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("task", name, summary, options)


def partition(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a way to split one source over simulated clients: a function of three arguments or four.

    It is called as `function(examples, clients, generator)`, with `options` behind them where it declares
    some; they are the job's `data.partition.options`. `examples` is a table in an order that its content
    decides (`examples["label"]` is a column as a list), `clients` how many clients there are, `generator` a
    numpy Generator seeded by the job. It returns a list of row numbers, from 0, for each client.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("partition", name, summary, options)


def metric(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a metric: what returns a `torchmetrics.Metric` whose states are tensors that sum over clients.

    It is called as `thing(data_info)`, or `thing(data_info, options)` where it declares options: a job's
    `evaluate.metrics` names it, and gives them. `data_info` is a dictionary of what all clients agree on,
    such as `data_info["classes"]`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("metric", name, summary, options)


def source(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a source of data: a function of one argument or two, which a job names in `data.source`.

    It is called as `function(offline)`, with `options` behind it where it declares some; they are the job's
    `data.options`. `offline` is the job's `backbone.offline`: where it is true nothing may be downloaded. It
    returns the path of a folder or file that the job's task can read, or tables: a dictionary with "train",
    and "test" where there is such a part, each a `pyarrow.Table` or a dictionary from a column's name to a
    list, in the columns of a Parquet file of that task. It is called anew by every process that needs the
    data, and must return the same examples each time.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("source", name, summary, options)


def backbone(
    name: str, *, summary: str = "", options: type[BaseModel] | None = None
) -> Callable[[Thing], Thing]:
    """Register a backbone: a class that derives from `atoll.backbones.ImageBackbone` or `TextBackbone`.

    A job names it in `backbone.name`, with `plugin:` before the name. It is made as `Class()`, or
    `Class(options)` where it declares options: a pydantic model given here, or a class `Options` inside it.
    They are the job's `backbone.options`.

    Raises:
        ConfigError: the name is taken.
    """
    return registering("backbone", name, summary, options)


def augmentation(
    name: str, *, summary: str = "", of: Literal["images", "texts"] = "images"
) -> Callable[[Thing], Thing]:
    """Register a random variation of inputs, a function of two arguments that a job names in `train.augment`.

    It is called as `function(example, generator)` and returns an example of the same kind: of images an RGB
    `PIL.Image` of the same size, of texts a string that isn't empty. `generator` is a `torch.Generator` on
    the CPU: draw from it and from nothing else, and remember nothing from one example to the next.

    Raises:
        ConfigError: the name is taken, or `of` is something else.
    """
    if of not in ("images", "texts"):
        raise ConfigError(f"augmentation {name!r}: of: expected 'images' or 'texts', found {of!r}")
    return registering("augmentation", name, summary, of=of)
