"""Distillation from a trained run: the teacher's soft labels for a client's examples, and the student's loss.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network": the student learns from its labels and
from the teacher's probabilities for the same example, both softened by a temperature.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.compatibility import check_agreed
from atoll.learning.learner import Learner
from atoll.protocol.messages import DataInfo
from atoll.protocol.tensors import Tensors, from_bytes
from atoll.tasks import task_named
from atoll.tasks.task import Task

PARTS = ("job.toml", "model/model.json", "model/model.safetensors")


@dataclass
class Teacher:
    """The model of the run that `train.teacher` names; it gets examples without augmentation."""

    learner: Learner
    tensors: Tensors
    temperature: float
    weight: float
    fingerprint: str

    def check(self, data_info: DataInfo) -> None:
        """Raises ConfigError unless the student has the same classes, in the same order."""
        classes, expected = self.learner.data_info["classes"], data_info["classes"]
        if classes != expected:
            raise ConfigError(
                f"train.teacher: its classes are {classes}, the job's are {expected}; expected the same, in"
                " the same order (data.classes)"
            )

    def with_soft_labels(self, shard: Shard) -> Shard:
        """The shard with targets [n, 1 + classes]: the class, then the teacher's probabilities."""
        soft = self.soft(self.learner.outputs_by_row(self.tensors, shard))
        return replace(shard, targets=torch.cat([shard.table.to(soft.dtype).unsqueeze(1), soft], dim=1))

    def soft(self, outputs: torch.Tensor) -> torch.Tensor:
        """Probabilities [n, classes] of outputs at the temperature; each row's bits depend on it alone."""
        rows = [torch.softmax(row / self.temperature, dim=-1) for row in outputs.to(torch.float64)]
        return torch.stack(rows).to(torch.float32)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The batch's mean of (1 - weight) cross-entropy + weight T^2 KL(teacher, student), temperature T."""
        hard = nn.functional.cross_entropy(outputs, targets[:, 0].to(torch.int64))
        logs = nn.functional.log_softmax(outputs / self.temperature, dim=1)
        soft = nn.functional.kl_div(logs, targets[:, 1:].to(logs), reduction="batchmean")
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * soft


def teacher_of(job: Job) -> Teacher | None:
    """The job's teacher, if it has one.

    Raises:
        ConfigError: there is no such run.
        WeightsError: its backbone's weights are not available here.
    """
    if job.train.teacher is None:
        return None
    run = Path(job.train.teacher)
    saved = _saved(run)
    teacher_job = Job.parse(saved["job"], origin=f"{run}/model/model.json")
    if teacher_job.personal.keep == "head":
        raise ConfigError(f"train.teacher: the clients of {run} kept their heads, expected a whole model")
    if teacher_job.strategy.makes_clusters:
        raise ConfigError(
            f"train.teacher: {run} has a model for each cluster of clients, expected one for all"
        )
    train = {"threads": job.train.threads, "device": job.train.device, "teacher": None}
    train |= {"teacher_temperature": None, "teacher_weight": None}
    teacher_job = teacher_job.model_copy(
        update={
            "train": teacher_job.train.model_copy(update=train),
            "backbone": teacher_job.backbone.model_copy(update={"compile": False}),
        }
    )
    learner = Learner.of(teacher_job, task_named(teacher_job.task.name), dict(saved["facts"]))
    check_agreed(learner)
    tensors = from_bytes((run / "model" / "model.safetensors").read_bytes())
    return Teacher(learner, tensors, job.train.temperature, job.train.distillation_weight, _fingerprint(run))


def check_teacher(job: Job, task: Task) -> None:
    """Raises ConfigError where the teacher does not fit the task, or would break a promise of privacy."""
    if job.train.teacher is None:
        return
    if not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(
            f"train.teacher: distillation is of classes, {task.name} has none an example; expected none"
        )
    run = Path(job.train.teacher)
    teacher_task = Job.parse(_saved(run)["job"], origin=f"{run}/model/model.json").task.name
    if teacher_task != task.name:
        raise ConfigError(f"train.teacher: expected a run of {task.name}, found one of {teacher_task}: {run}")
    for unit in job.privacy.units:
        _check_promise(job, unit, run)


def claim_of_teacher(run: Path, unit: str) -> dict[str, Any] | None:
    """A run's privacy claim for a unit (`epsilon`, `delta`, `seeded_noise`); None where it has none."""
    try:
        privacy = json.loads((run / "result.json").read_text("utf-8"))["privacy"]
        claim: dict[str, Any] | None = privacy["units"].get(unit)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"train.teacher: {run}/result.json does not say what was private: {error}"
        ) from None
    return claim


def _check_promise(job: Job, unit: str, run: Path) -> None:
    claim = claim_of_teacher(run, unit)
    if claim is None or claim.get("epsilon") is None:
        raise ConfigError(
            f"train.teacher: {run} promises nothing to the unit {unit!r}, and what it learnt of clients' data"
            " the student would pass on; expected a run with that promise"
        )
    if claim.get("seeded_noise") and not job.privacy.seeded_noise:
        raise ConfigError(
            f"train.teacher: the noise of {run} was seeded and protects nobody; expected a run without"
            " privacy.seeded_noise"
        )


def _saved(run: Path) -> dict[str, Any]:
    missing = next((part for part in PARTS if not (run / part).is_file()), None)
    if missing is not None:
        raise ConfigError(f"train.teacher: expected a finished run directory, found no {missing} in {run}")
    try:
        saved: dict[str, Any] = json.loads((run / "model" / "model.json").read_text("utf-8"))
        return {"job": saved["job"], "facts": dict(saved["facts"])}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"train.teacher: {run}/model/model.json is damaged: {error}") from None


def _fingerprint(run: Path) -> str:
    """SHA-256 over what was trained, and what it is of."""
    digest = hashlib.sha256()
    for part in PARTS[1:]:
        digest.update(hashlib.sha256((run / part).read_bytes()).digest())
    return digest.hexdigest()
