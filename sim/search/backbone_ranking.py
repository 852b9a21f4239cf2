"""Which backbone suits a job: a score of its features, before any head is trained in a federation.

Two scores stand beside each other: LogME on the clients' training examples, and the accuracy of a linear
probe that was fitted to them, on the examples that clients keep back. The server's test set is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.backbones.extract import Progress, extract
from atoll.backbones.resolve import PACKAGED, RAW, resolve
from atoll.backbones.torchvision_models import torchvision_names
from atoll.data.lazy import take_many
from atoll.errors import ConfigError, InputError
from atoll.job.job import Job
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import stream
from atoll.server.rounds.cohort import some
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population, client_names, number_of
from atoll.sim.search.logme import logme
from atoll.tasks import task_named

HEAD = 2000
"""Examples that are looked at where nothing is said."""

TIMED = 64
"""Examples whose features are computed to take the time."""

PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Ridge's, of which leave-one-out on the training examples takes the best."""


@dataclass(frozen=True)
class RankedBackbone:
    """What is said of one backbone: scores (higher is better), its features' width, its size, its pace."""

    backbone: str
    logme: float
    probe: float
    width: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """The examples that every backbone is judged on, as rows of all training examples."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def check_advisable(job: Job) -> None:
    """Raises ConfigError where there are no features with one class each, or a promise would be broken."""
    task = task_named(job.task.name)
    check_fits(job, task)
    if not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(
            f"task.name: backbones are ranked for classification on features, expected text-classification,"
            f" image-classification or the like, found {job.task.name}"
        )
    if job.privacy.units:
        raise ConfigError(
            "privacy.unit: backbones are ranked by data that is promised privacy; expected 'none',"
            f" found {job.privacy.unit!r}"
        )
    if not job.data.keeps_back:
        raise ConfigError(
            "data.validation_fraction: clients keep nothing back to judge by; expected above 0, found 0"
        )


def with_backbone(job: Job, name: str) -> Job:
    """The job on another backbone, with pretrained weights; on its own as it says."""
    if name == job.backbone.name:
        return job
    changed = {"name": name, "weights": "pretrained", "options": {}}
    return job.model_copy(update={"backbone": job.backbone.model_copy(update=changed)})


def candidates_here(job: Job) -> list[str]:
    """Backbones whose weights are on this machine, the job's own first; they may not fit its task."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    has_some = checkpoints.is_dir() and any(checkpoints.iterdir())
    names = [job.backbone.name, *(n for n in PACKAGED if "/" not in n)]
    names += [f"torchvision:{n}" for n in torchvision_names()] if has_some else []
    names += [*_in_hub_cache(), RAW]
    return [name for name in dict.fromkeys(names) if _is_here(job, name)]


def _in_hub_cache() -> list[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(f"hf:{repo.repo_id}" for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except CacheNotFound:
        return []


def _is_here(job: Job, name: str) -> bool:
    section = with_backbone(job, name).backbone.model_copy(update={"offline": True})
    try:
        resolve(section, job.seed)
    except InputError:
        return False
    return True


def sampled(population: Population, learner: Learner, head: int) -> Sample:
    """At most `head` examples that clients train on, and as many that they keep back, by the job's seed."""
    job = learner.job
    panel = some(
        client_names(job.federation.clients), job.evaluate.clients, stream(job.seed, "panel")
    )  # fmt: skip
    splits = PopulationIndex(population, learner).splits([number_of(name) for name in panel])
    train, held_out = (np.unique(np.concatenate([part[side] for part in splits])) for side in (0, 1))
    # Where clients draw their own, one may train on what another keeps back.
    held_out = np.setdiff1d(held_out, train)
    if not len(held_out) or not len(train):
        raise ConfigError("data.validation_fraction: clients keep nothing back to judge by; expected more")
    return Sample(_some_of(train, head, job, "train"), _some_of(held_out, head, job, "kept"))


def _some_of(rows: NDArray[np.int64], count: int, job: Job, purpose: str) -> NDArray[np.int64]:
    order = torch.randperm(len(rows), generator=stream(job.seed, "advise", purpose)).numpy()
    return np.sort(rows[order[:count]])


def advise(
    job: Job,
    names: Sequence[str],
    *,
    head: int = HEAD,
    progress: Callable[[str], Progress | None] = lambda name: None,
    left_out: Callable[[str, str], None],
) -> list[RankedBackbone]:
    """What is said of each backbone, the best by LogME first; `left_out` hears of those that don't fit.

    Raises:
        ConfigError, DataError: none fits, or the data is wrong.
    """
    population = Population.of(job)
    ranking, reasons = [], []
    for name in names:
        try:
            ranking.append(_advice(with_backbone(job, name), population, head, progress(name)))
        except InputError as error:
            reasons.append(str(error))
            left_out(name, str(error))
    if not ranking:
        raise ConfigError(f"no backbone fits {job.task.name}: {reasons[0]}")
    return sorted(ranking, key=lambda advice: -advice.logme)


def _advice(job: Job, population: Population, head: int, progress: Progress | None) -> RankedBackbone:
    task = task_named(job.task.name)
    learner = Learner.of(job, task, task.merge_info(population.roster(job).data_info), progress)
    encoder = learner.encoder
    sample, whole = sampled(population, learner, head), population.whole(learner)
    train, held_out = whole.select(sample.train.tolist()), whole.select(sample.held_out.tolist())
    features, other = learner.features.plain(train).numpy(), learner.features.plain(held_out).numpy()
    labels, true = train.table.numpy(), held_out.table.numpy()
    timed = take_many(train.inputs, range(min(TIMED, len(train))))
    started = time.monotonic()
    extract(encoder, timed, threads=job.train.threads, device=job.train.device)
    seconds = (time.monotonic() - started) / len(timed)
    return RankedBackbone(
        job.backbone.name,
        logme(features, labels),
        probe_accuracy(features, labels, other, true),
        features.shape[1],
        sum(parameter.numel() for parameter in encoder.parameters()),
        seconds,
    )


def probe_accuracy(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    other: NDArray[np.floating],
    true: NDArray[np.integer],
) -> float:
    """What part of `other` [m, width] a ridge classifier fitted to `features` [n, width] gets right."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return float((true == labels[0]).mean())
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES)).fit(features, labels)
    return float(probe.score(other, true))
