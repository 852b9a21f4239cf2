"""The base class of tasks whose data format is described completely by one `Schema`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.data.classification import Findings, Table
from atoll.data.dataset import Dataset
from atoll.data.schema import Schema
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa


class SchemaTask(Task):
    """Reads, checks, hashes and writes data by the schema of `records`; hashes depend on no option."""

    def records(self, options: Options) -> Schema:
        """The schema of the data of a job with these `task.options`."""
        raise TypeError(f"{type(self).__name__} does not say how its data is read")

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        return self.records(options).read(source, data)

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        return self.records(options).inspect(source, data)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return self.records(job.task.options).adopted(splits)

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        self.records({}).write(dataset, folder, data)

    def keys(self, dataset: Dataset) -> list[bytes]:
        return self.records({}).keys(dataset)
