"""`[train]`: one client's local training in one round, and learning-rate schedules.

With T rounds, of which W are the warm-up, the learning rate in round t (from 1) is multiplied by

    t / W                                           while t <= W: linear warm-up
    1                                               constant
    (1 + cos(pi (t - W - 1) / (T - W))) / 2         cosine (Loshchilov and Hutter 2017, without restarts)
    decay ^ floor((t - W - 1) / step)               step: times `decay` after every `step` rounds

so that the first round after the warm-up has the full rate, as with torch's CosineAnnealingLR and StepLR. The
server's and the clients' rates follow the same formulas; a client's may count its local steps instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator

from atoll.job.section import Between, Count, Decay, Excludes, Needs, NotNegative, Options, Positive, Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from atoll.job.job import Job

LrScheduleKind = Literal["constant", "cosine", "step"]


class LrScheduleKeys(Protocol):
    """The keys of a job's table that describe the schedule of its `lr`."""

    @property
    def lr_schedule(self) -> LrScheduleKind | None: ...
    @property
    def lr_warmup(self) -> int | None: ...
    @property
    def lr_step(self) -> int | None: ...
    @property
    def lr_decay(self) -> float | None: ...


OF_A_SCHEDULE = Needs("lr_schedule", otherwise="say 'constant'")
OF_STEPS = Needs("lr_schedule", ("step",))


def check_lr_schedule(section: LrScheduleKeys, what: str = "rounds") -> None:
    """Raises ValueError, in one line that names the key, if the schedule lacks a key that it needs."""
    if section.lr_schedule == "step" and section.lr_step is None:
        raise ValueError(f"lr_schedule: 'step' needs lr_step, the {what} between two steps")


def lr_factor(section: LrScheduleKeys, number: int, count: int) -> float:
    """The factor of the learning rate in round (or step) `number`; numbers go from 1 to `count`.

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
    steps: Annotated[
        Count | None,
        Excludes("epochs", "for one says the other"),
        Excludes(
            "privacy.unit",
            "under example-level privacy privacy.steps says how many noised steps a round has",
            ("example", "both"),
        ),
    ] = None
    """Local steps of each client in a round, instead of `epochs`; small shards are repeated."""
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: Positive = 0.1
    lr_schedule: LrScheduleKind | None = None
    lr_schedule_over: Annotated[Literal["rounds", "steps"], Needs("lr_schedule")] = "rounds"
    lr_warmup: Annotated[Count | None, OF_A_SCHEDULE] = None
    lr_step: Annotated[Count | None, OF_STEPS] = None
    lr_decay: Annotated[Between | None, OF_STEPS] = None
    layer_decay: Between | None = None
    clip_norm: Annotated[
        Positive | None,
        Excludes(
            "privacy.unit",
            "under example-level privacy each example's gradient is clipped to privacy.clipping_norm, and"
            " noise would be clipped with the sum",
            ("example", "both"),
        ),
    ] = None
    momentum: Annotated[Decay, Needs("optimizer", ("sgd",))] = 0.0
    weight_decay: NotNegative = 0.0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: str = "cpu"
    imbalance: Annotated[
        Literal["weights", "focal", "logits", "sampling"] | None,
        Excludes("teacher", "for a loss of answers knows no classes"),
    ] = None
    imbalance_strength: Annotated[float | None, Field(gt=0, le=10), Needs("imbalance")] = None
    label_smoothing: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    augment: tuple[str, ...] = ()
    augment_options: Annotated[dict[str, Options], Needs("augment")] = Field(default_factory=dict)
    """The options of extensions' augmentations in `augment`, by name."""
    cached_views: Annotated[
        int | None, Field(ge=1, le=10_000), Needs("augment"), Needs("tune.method", ("head",))
    ] = None
    cached_states: Annotated[
        Literal["fp32", "bf16"] | None,
        Excludes("augment", "for inputs that vary have other states each time"),
    ] = None
    """The precision in which states before the first tuned block are cached on disk; None: no cache."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1
    checkpoint_activations: bool = False
    teacher: str | None = None
    teacher_temperature: Annotated[float | None, Field(gt=0, le=100), Needs("teacher")] = None
    teacher_weight: Annotated[float | None, Field(gt=0, le=1), Needs("teacher")] = None

    @model_validator(mode="after")
    def _parts_of_a_batch_are_even(self) -> TrainSection:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size = {self.batch_size}, found {self.accumulate}"
            )
        return self

    def local_steps(self, examples: int) -> int:
        """The number of local steps in a round, for a shard of this many examples.

        >>> TrainSection(batch_size=16, epochs=2).local_steps(33), TrainSection(steps=100).local_steps(33)
        (6, 100)
        """
        return self.steps or self.epochs * self._steps_of_epoch(examples)

    def with_steps(self, steps: int | None) -> TrainSection:
        """The same settings with this number of local steps in a round; unchanged for None."""
        return self if steps is None else self.model_copy(update={"steps": steps})

    def epochs_begun(self, examples: int) -> int:
        """The number of epochs in a round, for a shard of this many examples; the last may be incomplete.

        >>> TrainSection(batch_size=16, steps=7).epochs_begun(33)
        3
        """
        return self.epochs if self.steps is None else math.ceil(self.steps / self._steps_of_epoch(examples))

    def examples_seen(self, examples: int) -> int:
        """The number of examples in all batches of a round, with repetitions, for a shard of this size.

        >>> TrainSection(batch_size=16, steps=7).examples_seen(33)  # 33 + 33 + 16
        82
        """
        if self.steps is None:
            return self.epochs * examples
        epochs, rest = divmod(self.steps, self._steps_of_epoch(examples))
        return epochs * examples + min(rest * self.batch_size, examples)

    def expected_examples_seen(self, sizes: NDArray[Any]) -> NDArray[Any]:
        """`examples_seen` for many clients, [clients], with every batch counted as full.

        `sizes` [clients] may be expected sizes, which are no integers.
        """
        return sizes * self.epochs if self.steps is None else self.steps * sizes.clip(max=self.batch_size)

    def _steps_of_epoch(self, examples: int) -> int:
        return max(1, math.ceil(examples / self.batch_size))

    @property
    def autograd_only_keys(self) -> tuple[str, ...]:
        """The keys that are set and only apply where gradients are computed by autograd."""
        keys = ("precision", "accumulate", "checkpoint_activations")
        return tuple(key for key in keys if self.is_given(key))

    @model_validator(mode="after")
    def _a_schedule_has_what_it_uses(self) -> TrainSection:
        check_lr_schedule(self, self.lr_schedule_over)
        return self

    @property
    def varies_by_step(self) -> bool:
        """Whether the learning rate changes from one local step to the next."""
        return self.lr_schedule is not None and self.lr_schedule_over == "steps"

    @property
    def temperature(self) -> float:
        """The softmax temperature for the outputs of teacher and student in distillation."""
        return 2.0 if self.teacher_temperature is None else self.teacher_temperature

    @property
    def distillation_weight(self) -> float:
        """The weight of the teacher's loss; that of the labels' loss is 1 minus it."""
        return 0.5 if self.teacher_weight is None else self.teacher_weight


PLAIN_STEPS: dict[str, None] = dict.fromkeys(
    ("lr_schedule", "lr_warmup", "lr_step", "lr_decay", "layer_decay", "clip_norm")
)
"""An update of a `TrainSection` after which every step is the same multiple of its gradient."""


def lr_of_round(train: TrainSection, round: int, rounds: int) -> float:
    """A client's learning rate in a round from 1 to `rounds`, without a schedule over local steps.

    Training outside of the rounds has the full rate (round 0), or the last round's (a later round).
    """
    if train.lr_schedule is None or train.varies_by_step or round < 1:
        return train.lr
    return train.lr * lr_factor(train, min(round, rounds), rounds)


def check_training(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if `[train]` doesn't work in this job."""
    train, rounds = job.train, job.federation.rounds
    if not train.varies_by_step and (train.lr_warmup or 0) >= rounds:
        raise ValueError(
            f"train.lr_warmup: expected less than federation.rounds = {rounds}, found {train.lr_warmup}"
        )
    if train.layer_decay is not None and {job.tune.method, *(s.method for s in job.tune.then)} == {"head"}:
        raise ValueError(
            "train.layer_decay has no meaning with tune.method = 'head', which trains no lower layer: remove"
            " it"
        )
    _check_cached_states(job)
    if train.varies_by_step and job.strategy.name in ("scaffold", "fednova"):
        raise ValueError(
            f"train.lr_schedule_over: {job.strategy.name} counts each local gradient of a round alike;"
            " expected 'rounds', found 'steps'"
        )


def _check_cached_states(job: Job) -> None:
    """Raises ValueError if states are to be cached but the first block is tuned, so there are none."""
    if job.train.cached_states is None:
        return
    for tune in (job.tune, *job.tune.then):
        if tune.method in ("full", "seeds") or (tune.method == "lora" and tune.layers is None):
            missing = " without tune.layers" if tune.method == "lora" else ""
            raise ValueError(
                f"train.cached_states has no meaning with tune.method = {tune.method!r}{missing}, which tunes"
                " the first block too: remove it"
            )
