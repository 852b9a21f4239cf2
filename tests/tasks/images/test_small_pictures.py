"""The small detector and the small segmenter: built, tuned, restarted from each other's runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from atoll.data.shard import Shard
from atoll.datasets.synthetic.shapes import generated_shapes
from atoll.datasets.synthetic.street import generated_street
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named

NETWORKS = {"object-detection": "atoll:small-detector", "segmentation": "atoll:small-segmenter"}
CLASSES = {
    "generated-shapes": ("background", "circle", "square", "triangle"),
    "generated-street": ("background", "road", "car", "pedestrian", "sign"),
}


@cache
def drawn(task: str, source: str) -> TemporaryDirectory[str]:
    """A folder with 16 of the source's pictures, written once, which goes when the tests are over."""
    folder = TemporaryDirectory(prefix="drawn-")
    make = {"generated-shapes": generated_shapes, "generated-street": generated_street}[source]
    job = job_of(task, source, data={"source": source})
    own = task_named(task)
    own.write(own.from_builtin({"train": make(0, 20)["train"]}, job).train, Path(folder.name, "d"), job.data)
    return folder


def job_of(task: str, source: str = "generated-shapes", **tables: Any) -> Job:
    """A job on a few of the source's pictures, unless the tables name other data."""
    if "data" not in tables:
        tables["data"] = {"source": str(Path(drawn(task, source).name, "d"))}
    options = {"classes": CLASSES[source]} if task == "segmentation" else {}
    table: dict[str, Any] = {
        "name": "small",
        "seed": 5,
        "task": {"name": task, "options": options},
        "backbone": {"name": NETWORKS[task], "weights": "random", "image_size": 48, "options": {"width": 8}},
        "tune": {"method": "full"},
        "train": {"lr": 0.003, "batch_size": 8, "optimizer": "adamw"},
        "federation": {"clients": 2, "rounds": 1, "cohort": 1},
        "evaluate": {"baselines": ()},
    }
    return Job.parse(table | tables, origin="test")


def learner_of(job: Job, count: int = 4) -> tuple[Learner, Shard]:
    population, task = Population.of(job), task_named(job.task.name)
    data_info = task.merge_info([task.local_info(population.train, job.data, job.task.options)])
    learner = Learner.of(job, task, data_info)
    return learner, population.whole(learner).select(range(count))


@pytest.mark.parametrize("task", NETWORKS)
def test_nothing_in_them_looks_at_a_batch(task: str) -> None:
    learner, _ = learner_of(job_of(task))
    kinds = {type(module).__name__ for module in learner.model.modules()}
    assert "GroupNorm" in kinds
    assert not any("BatchNorm" in kind or "Dropout" in kind for kind in kinds)


@pytest.mark.parametrize("task", NETWORKS)
def test_an_option_that_does_not_fit_is_named(task: str) -> None:
    backbone = {"name": NETWORKS[task], "weights": "random", "options": {"width": 12}}
    learner, _ = learner_of(job_of(task, backbone=backbone))
    with pytest.raises(ConfigError, match=r"backbone\.options.*width"):
        _ = learner.model


@pytest.mark.slow
def test_the_segmenter_trains_under_example_level_privacy(tmp_path: Path) -> None:
    private = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.1}
    private |= {"seeded_noise": True}
    job = job_of("segmentation", privacy=private, train={"lr": 0.1, "optimizer": "sgd"})
    assert simulate(job, tmp_path / "out", on_event=ignore_events, report=False).privacy["epsilon"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", NETWORKS)
def test_a_run_is_gone_on_from_with_other_classes(task: str, tmp_path: Path) -> None:
    """All but the layers that say classes are the run's."""
    first = simulate(job_of(task), tmp_path / "first", on_event=ignore_events, report=False)
    backbone = {"name": NETWORKS[task], "weights": str(tmp_path / "first"), "image_size": 48}
    backbone |= {"options": {"width": 8}}
    ahead, _ = learner_of(job_of(task, "generated-street", backbone=backbone))
    fresh, _ = learner_of(job_of(task, "generated-street"))
    changed = {
        name for name, tensor in ahead.initial().items() if not torch.equal(tensor, fresh.initial()[name])
    }
    assert first.rounds[0]["loss"] > 0 and changed
    head = {"object-detection": "box_predictor", "segmentation": "classifier.2"}[task]
    kept = {name for name in fresh.initial() if name not in changed}
    assert all(head in name for name in kept), kept
