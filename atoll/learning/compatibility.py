"""Checks that the task and this machine support what a job asks for, and that all sites have the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.backbones.brought.names import is_brought
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.compiled import compiler
from atoll.learning.determinism import check_device, enable_determinism
from atoll.learning.objective.class_imbalance import check_imbalance, check_smoothing
from atoll.learning.split import check_shots
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import check_info_stated
from atoll.tasks.task import Task

if TYPE_CHECKING:
    from atoll.learning.learner import Learner


def check_fits(job: Job, task: Task) -> None:
    """Raises ConfigError unless the task and this machine support all that the job asks for."""
    from atoll.learning.objective.distillation import check_teacher

    if job.data.time_format is not None and not task.reads_times:
        raise ConfigError(f"data.time_format: {task.name} reads no times, expected none")
    if not task.reads_pictures and (key := next((k for k in ("bits", "window") if getattr(job.data, k)), "")):
        raise ConfigError(f"data.{key}: {task.name} reads no pictures, expected none")
    if is_brought(job.backbone) and not task.takes_brought_backbone(job):
        raise ConfigError(
            f"backbone.name: {task.name} takes no encoder of an extension, which makes one row of features"
            f" of an example; expected another, found {job.backbone.name!r}"
        )
    task.check(job)
    check_info_stated(job, task)
    check_imbalance(job, task)
    check_smoothing(job, task)
    check_shots(job, task)
    if job.tune.head_init is not None and not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(f"tune.head_init: {task.name} has no head of classes on features, expected none")
    if job.strategy.keeps_last_model and not task.uses_pooled_features:
        raise ConfigError(
            f"strategy.name: {job.strategy.name} contrasts features before the head, and {task.name} has no"
            " head on features; expected another"
        )
    if job.strategy.makes_clusters and not task.uses_pooled_features:
        raise ConfigError(
            f"strategy.name: {job.strategy.name}'s models differ at first by the heads that are drawn for"
            f" them, and {task.name} has no head on features; expected another"
        )
    if job.train.cached_views is not None and not task.uses_pooled_features:
        raise ConfigError(f"train.cached_views: {task.name} has no features to keep, expected none")
    if (
        job.train.cached_states is not None
        and task.uses_pooled_features
        and all(stage.backbone_is_frozen for stage in job.stages)
    ):
        raise ConfigError("train.cached_states: a head learns from kept features, expected none")
    if job.data.folds is not None and task.has_own_split:
        raise ConfigError(f"data.folds: {task.name} says itself what is measured on, expected none")
    if job.train.dropout is not None and task.uses_pooled_features and job.tune.method == "head":
        raise ConfigError("train.dropout: a head on a frozen backbone has no layer of dropout, expected none")
    check_autograd(job, task)
    check_teacher(job, task)
    check_device(job.train.device)
    enable_determinism(job.train.device)
    if job.backbone.compile:
        compiler()


def check_autograd(job: Job, task: Task) -> None:
    """Raises ConfigError where heads train in closed form, and the job says how autograd is to do it."""
    if task.uses_pooled_features and job.backbone_is_frozen:
        for key in job.train.autograd_only_keys:
            raise ConfigError(
                f"train.{key}: has no meaning for a head on kept features, whose gradients have a closed form"
                " in float32; remove it, or tune more than the head"
            )


def required_info(learner: Learner) -> DataInfo:
    """Hashes that must be the same at all sites: of the backbone, the task's needs and the teacher.

    Raises:
        ConfigError: the teacher has other classes.
    """
    info = {"backbone": learner.backbone.fingerprint} | learner.task.required_info()
    if learner.teacher is None:
        return info
    learner.teacher.check(learner.data_info)
    return info | {"teacher": learner.teacher.fingerprint}


def check_agreed(learner: Learner) -> None:
    """Raises ConfigError unless weights, teacher and task here have the hashes in the run's data info."""
    agreed = learner.data_info
    if learner.teacher is not None:
        stated, here = agreed.get("teacher"), learner.teacher.fingerprint
        if stated is not None and stated != here:
            raise ConfigError(
                f"train.teacher: {learner.job.train.teacher} is not the run's teacher"
                f" (here {here[:12]}, there {stated[:12]})"
            )
    name, expected, fingerprint = learner.backbone.name, agreed.get("backbone"), learner.backbone.fingerprint
    if expected is not None and expected != fingerprint:
        raise ConfigError(
            f"backbone {name}: these weights are not the run's"
            f" (here {fingerprint[:12]} from {learner.backbone.origin}, there {expected[:12]})"
        )
    for need, here in learner.task.required_info().items():
        stated = agreed.get(need)
        if stated is not None and stated != here:
            raise ConfigError(
                f"backbone {name}: its {need} is not the run's (here {here[:12]}, there {stated[:12]})"
            )
