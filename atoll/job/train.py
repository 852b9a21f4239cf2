"""`[train]`: one client's local training in one round, and how its learning rate changes.

With T rounds of which W warm up, round t (from 1) takes the learning rate times

    t / W                                           while t <= W: linear warm-up
    1                                               constant
    (1 + cos(pi (t - W - 1) / (T - W))) / 2         cosine (Loshchilov and Hutter 2017, without restarts)
    decay ^ floor((t - W - 1) / step)               step: times `decay` after every `step` rounds

so that the first round after the warm-up takes the whole rate, as with torch's CosineAnnealingLR and StepLR.
The server's rate and the clients' follow the same formula; a client's may count its local steps instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field, model_validator

from atoll.job.section import Between, Count, Decay, NotNegative, Positive, Section

if TYPE_CHECKING:
    from atoll.job.job import Job

LrScheduleKind = Literal["constant", "cosine", "step"]


class LrScheduleKeys(Protocol):
    """A table of the job with a schedule of its `lr`."""

    @property
    def lr_schedule(self) -> LrScheduleKind | None: ...
    @property
    def lr_warmup(self) -> int | None: ...
    @property
    def lr_step(self) -> int | None: ...
    @property
    def lr_decay(self) -> float | None: ...


def check_lr_schedule(section: LrScheduleKeys, what: str = "rounds") -> None:
    """Raises ValueError, in one line that names the key, unless the schedule has just what it uses."""
    for key in ("lr_step", "lr_decay"):
        if getattr(section, key) is not None and section.lr_schedule != "step":
            raise ValueError(f"{key} has no meaning without lr_schedule = 'step': remove it")
    if section.lr_schedule == "step" and section.lr_step is None:
        raise ValueError(f"lr_schedule: 'step' needs lr_step, the {what} between two steps")
    if section.lr_warmup is not None and section.lr_schedule is None:
        raise ValueError("lr_warmup has no meaning without lr_schedule: remove it, or say 'constant'")


def lr_factor(section: LrScheduleKeys, number: int, count: int) -> float:
    """What part of the learning rate the round, or step, of this number takes; numbers go from 1 to `count`.

    >>> [lr_factor(TrainSection(lr_schedule="step", lr_step=2), t, 4) for t in (1, 2, 3, 4)]
    [1.0, 1.0, 0.1, 0.1]
    """
    warmup = section.lr_warmup or 0
    if number <= warmup:
        return number / warmup
    past = number - warmup - 1
    match section.lr_schedule:
        case "cosine":
            return (1 + math.cos(math.pi * past / max(1, count - warmup))) / 2
        case "step":
            assert section.lr_step is not None, "the job's rules ask for it"
            return float((section.lr_decay or 0.1) ** (past // section.lr_step))
    return 1.0


class TrainSection(Section):
    """`[train]`: one client's local training in one round."""

    epochs: Count = 1
    steps: Count | None = None
    """Local steps of each client in a round, in place of `epochs`: small shards are gone through again."""
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: Positive = 0.1
    lr_schedule: LrScheduleKind | None = None
    lr_schedule_over: Literal["rounds", "steps"] = "rounds"
    lr_warmup: Count | None = None
    lr_step: Count | None = None
    lr_decay: Between | None = None
    layer_decay: Between | None = None
    clip_norm: Positive | None = None
    momentum: Decay = 0.0
    weight_decay: NotNegative = 0.0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: str = "cpu"
    imbalance: Literal["weights", "focal", "logits", "sampling"] | None = None
    imbalance_strength: Annotated[float, Field(gt=0, le=10)] | None = None
    label_smoothing: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    augment: tuple[str, ...] = ()
    cached_views: Annotated[int, Field(ge=1, le=10_000)] | None = None
    cached_states: Literal["fp32", "bf16"] | None = None
    """In which precision the states below the first tuned block are kept on disk; not kept unless said."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1
    checkpoint_activations: bool = False
    teacher: str | None = None
    teacher_temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    teacher_weight: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _parts_of_a_batch_are_even(self) -> TrainSection:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size = {self.batch_size}, found {self.accumulate}"
            )
        return self

    @model_validator(mode="after")
    def _a_round_is_counted_once(self) -> TrainSection:
        if self.steps is not None and self.epochs != 1:
            raise ValueError("steps and epochs exclude each other: keep one")
        return self

    def local_steps(self, examples: int) -> int:
        """Steps of a round on so many examples.

        >>> TrainSection(batch_size=16, epochs=2).local_steps(33), TrainSection(steps=100).local_steps(33)
        (6, 100)
        """
        return self.steps or self.epochs * self._steps_of_epoch(examples)

    def epochs_begun(self, examples: int) -> int:
        """Epochs that a round's steps on so many examples go into, of which the last one may end early.

        >>> TrainSection(batch_size=16, steps=7).epochs_begun(33)
        3
        """
        return self.epochs if self.steps is None else math.ceil(self.steps / self._steps_of_epoch(examples))

    def examples_seen(self, examples: int) -> int:
        """How many examples a round's steps see, of a shard of so many, each as often as it is seen.

        >>> TrainSection(batch_size=16, steps=7).examples_seen(33)  # 33 + 33 + 16
        82
        """
        if self.steps is None:
            return self.epochs * examples
        epochs, rest = divmod(self.steps, self._steps_of_epoch(examples))
        return epochs * examples + min(rest * self.batch_size, examples)

    def _steps_of_epoch(self, examples: int) -> int:
        return max(1, math.ceil(examples / self.batch_size))

    @property
    def autograd_only_keys(self) -> tuple[str, ...]:
        """Keys that are set and say how gradients are taken by autograd."""
        keys = ("precision", "accumulate", "checkpoint_activations")
        return tuple(key for key in keys if getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> TrainSection:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum has no meaning with optimizer = {self.optimizer!r}: remove it")
        return self

    @model_validator(mode="after")
    def _a_schedule_has_what_it_uses(self) -> TrainSection:
        check_lr_schedule(self, self.lr_schedule_over)
        if self.lr_schedule is None and self.lr_schedule_over != "rounds":
            raise ValueError("lr_schedule_over has no meaning without lr_schedule: remove it")
        return self

    @property
    def varies_by_step(self) -> bool:
        """Whether the learning rate of one local step is another than that of the next."""
        return self.lr_schedule is not None and self.lr_schedule_over == "steps"

    @model_validator(mode="after")
    def _strength_is_of_something(self) -> TrainSection:
        if self.imbalance_strength is not None and self.imbalance is None:
            raise ValueError("imbalance_strength has no meaning without imbalance: remove it")
        return self

    @model_validator(mode="after")
    def _a_teacher_teaches_alone(self) -> TrainSection:
        for key in ("teacher_temperature", "teacher_weight"):
            if getattr(self, key) is not None and self.teacher is None:
                raise ValueError(f"{key} has no meaning without teacher: remove it")
        if self.teacher is not None and self.imbalance is not None:
            raise ValueError("imbalance and teacher exclude each other: keep one")
        return self

    @property
    def temperature(self) -> float:
        """What softens the answers of teacher and student."""
        return 2.0 if self.teacher_temperature is None else self.teacher_temperature

    @property
    def distillation_weight(self) -> float:
        """The teacher's part in the loss; the labels have the rest."""
        return 0.5 if self.teacher_weight is None else self.teacher_weight

    @model_validator(mode="after")
    def _views_are_of_what_varies(self) -> TrainSection:
        if self.cached_views is not None and not self.augment:
            raise ValueError("cached_views has no meaning without augment: remove it")
        return self


PLAIN_STEPS: dict[str, None] = dict.fromkeys(
    ("lr_schedule", "lr_warmup", "lr_step", "lr_decay", "layer_decay", "clip_norm")
)
"""What makes every step the same multiple of its gradient, as an update of a `TrainSection`."""


def lr_of_round(train: TrainSection, round: int, rounds: int) -> float:
    """A client's learning rate in one of so many rounds, before what its schedule over local steps says.

    Training outside of the rounds takes the whole rate (round 0), or the last round's (a later one).
    """
    if train.lr_schedule is None or train.varies_by_step or round < 1:
        return train.lr
    return train.lr * lr_factor(train, min(round, rounds), rounds)


def check_training(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where local training can't be as `[train]` asks."""
    train, rounds = job.train, job.federation.rounds
    if not train.varies_by_step and (train.lr_warmup or 0) >= rounds:
        raise ValueError(
            f"train.lr_warmup: expected less than federation.rounds = {rounds}, found {train.lr_warmup}"
        )
    if train.clip_norm is not None and "example" in job.privacy.units:
        raise ValueError(
            "train.clip_norm: under example-level privacy each example's gradient is clipped to"
            " privacy.clipping_norm, and noise would be clipped with the sum; expected none"
        )
    if train.layer_decay is not None and {job.tune.method, *(s.method for s in job.tune.then)} == {"head"}:
        raise ValueError(
            "train.layer_decay has no meaning with tune.method = 'head', which trains no lower layer: remove"
            " it"
        )
    if train.steps is not None and "example" in job.privacy.units:
        raise ValueError(
            "train.steps: under example-level privacy privacy.steps says how many noised steps a round has;"
            " remove it"
        )
    _check_cached_states(job)
    for key in ("lr_schedule", "layer_decay") if job.privacy.audit else ():
        if getattr(train, key) is not None:
            raise ValueError(f"privacy.audit: a run with train.{key} can't be attacked; expected false")
    if train.varies_by_step and job.strategy.name in ("scaffold", "fednova"):
        raise ValueError(
            f"train.lr_schedule_over: {job.strategy.name} counts each local gradient of a round alike;"
            " expected 'rounds', found 'steps'"
        )


def _check_cached_states(job: Job) -> None:
    """Raises ValueError where states are to be kept, and inputs vary or the first block is tuned."""
    if job.train.cached_states is None:
        return
    if job.train.augment:
        raise ValueError(
            "train.cached_states: train.augment varies inputs, whose states then differ; remove one"
        )
    for tune in (job.tune, *job.tune.then):
        if tune.method == "full" or (tune.method == "lora" and tune.layers is None):
            missing = "" if tune.method == "full" else " without tune.layers"
            raise ValueError(
                f"train.cached_states has no meaning with tune.method = {tune.method!r}{missing}, which tunes"
                " the first block too: remove it"
            )
