"""Data sets of the Hugging Face Hub, named `hf:OWNER/NAME`: fetched once into the cache, at one commit.

After that a run asks the Hub nothing: what is in the cache stays until its folder is removed. So two machines
have the same data for certain only with a `data.revision` that is a commit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import ConfigError, DataError
from atoll.job.job import HUB_PREFIX, Job
from atoll.system.cache import cache_root, cached_folder

if TYPE_CHECKING:
    from atoll.data.classification import Table

SHOWN_COMMIT = 12
"""Characters of a commit that are shown."""


@dataclass(frozen=True)
class HubDataset:
    """Which data set of the Hub a job names: its configuration, and the branch, tag or commit, if any."""

    name: str
    subset: str | None
    revision: str | None

    @classmethod
    def of(cls, job: Job) -> HubDataset:
        """The job's; its source must begin with `HUB_PREFIX`."""
        return cls(job.data.source.removeprefix(HUB_PREFIX), job.data.subset, job.data.revision)

    @property
    def folder(self) -> Path:
        """Where it lies in the cache, once it is there."""
        key = hashlib.sha256(json.dumps([self.name, self.subset, self.revision]).encode()).hexdigest()
        return cache_root() / "hub" / f"{self.name.replace('/', '--')}-{key[:16]}"


def hub_source(job: Job, read: Callable[[Path], Table]) -> Table:
    """What `read` makes of the job's data set on the Hub, with a note of the commit that it was fetched at.

    Raises:
        ConfigError: it isn't in the cache, and can't be fetched or may not be.
        DataError: it isn't data of the task.
    """
    dataset = HubDataset.of(job)
    folder = cached_folder(dataset.folder, lambda staging: _fetch(dataset, job, staging))
    commit = (folder / "commit").read_text("utf-8")
    try:
        table = read(folder / "data")
    except DataError as error:
        raise DataError(str(error).replace(str(folder / "data"), job.data.source)) from None
    note = f"{job.data.source} is that of commit {commit[:SHOWN_COMMIT]}, in {folder}"
    return replace(table, notes=(*table.notes, note))


def _fetch(dataset: HubDataset, job: Job, staging: Path) -> None:
    """Write the data set as `save_to_disk` does to `staging`/data, and its commit beside it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if job.backbone.offline or HF_HUB_OFFLINE:
        forbidden = "backbone.offline" if job.backbone.offline else "HF_HUB_OFFLINE"
        raise ConfigError(
            f"data.source: {job.data.source} is not in the cache ({dataset.folder}), and {forbidden} forbids"
            " to fetch it; run once without, or name a folder that save_to_disk wrote"
        )
    import datasets
    from huggingface_hub import HfApi

    with _told_in_a_line(dataset, job):
        commit = HfApi().dataset_info(dataset.name, revision=dataset.revision).sha
        splits = datasets.load_dataset(
            dataset.name, dataset.subset, revision=commit, cache_dir=str(staging / "prepared")
        )
        splits.save_to_disk(str(staging / "data"))
    (staging / "commit").write_text(str(commit), "utf-8")
    shutil.rmtree(staging / "prepared")


@contextmanager
def _told_in_a_line(dataset: HubDataset, job: Job) -> Iterator[None]:
    """Within, what keeps the data set from being fetched is told as a mistake in the job's key."""
    import datasets.exceptions
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    source = job.data.source
    try:
        yield
    except RevisionNotFoundError:
        raise ConfigError(
            f"data.revision: {source} has no revision {dataset.revision!r}, expected a branch, a tag or a"
            " commit"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"data.source: the Hub has no data set {dataset.name} that can be read from here; a private one"
            " needs HF_TOKEN"
        ) from None
    except ValueError as error:  # an unknown configuration, or none where there are several
        raise ConfigError(f"data.subset: {source}: {_in_a_line(error)}") from None
    except (
        HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, datasets.exceptions.DatasetsError
    ) as error:  # fmt: skip
        raise ConfigError(f"data.source: {source} can't be fetched: {_in_a_line(error)}") from None


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
