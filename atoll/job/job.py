"""The job: a frozen, validated description of a federated fine-tuning run, which is data and never code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, FiniteFloat, Tag, ValidationError, field_validator, model_validator

from atoll.errors import ConfigError, did_you_mean
from atoll.job.attack import AttackSection, check_attack
from atoll.job.client_state import WITH_CLIENT_STATE, check_client_state, check_last_models
from atoll.job.closed_form import check_closed_form
from atoll.job.error_text import KINDS, OTHER, explain
from atoll.job.evaluate import EvaluateSection, check_measuring
from atoll.job.federation import (
    SENDS_LOSSES,
    FederationSection,
    check_asynchronous,
    check_losses_may_be_sent,
    check_selection,
    check_vote,
    check_weights,
)
from atoll.job.lora_merge import check_lora_merge
from atoll.job.personal import PersonalSection, check_clusters, check_inner_steps, check_personal
from atoll.job.privacy import PrivacySection, check_promises
from atoll.job.section import Between, Count, Decay, Excludes, Needs, NotNegative, Options, Positive, Section
from atoll.job.toml import apply_override, read_job, with_absolute_paths
from atoll.job.train import (
    OF_A_SCHEDULE,
    OF_STEPS,
    LrScheduleKind,
    TrainSection,
    check_lr_schedule,
    check_training,
)
from atoll.job.tune import TuneSection, TuneStage, check_seeds, is_superset


class TaskSection(Section):
    """`[task]`: the learning task; which options are valid depends on its name."""

    name: str
    options: Options = Field(default_factory=dict)


class Iid(Section):
    """Examples are divided evenly at random, so all clients have the same distribution."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Section):
    """Label skew: each class is divided among the clients in Dirichlet(alpha) proportions."""

    kind: Literal["dirichlet"]
    alpha: Positive
    by: str = "label"
    min_examples: Annotated[int, Field(ge=0)] = 2


class Pathological(Section):
    """Label skew: every client holds examples of only `classes_per_client` classes."""

    kind: Literal["pathological"]
    classes_per_client: Count
    by: str = "label"


class Natural(Section):
    """One client for each value of a column: a user, a hospital."""

    kind: Literal["natural"]
    by: str


class Resampled(Section):
    """Every client samples its examples from the whole source, so clients may share some.

    With `alpha`, each client's class proportions are drawn from Dirichlet(alpha).
    """

    kind: Literal["resampled"]
    examples: Count
    alpha: Positive | None = None
    by: str = "label"


class OtherPartition(Section):
    """A partition from an extension, which validates `options` itself and may not be imported yet."""

    kind: str
    options: Options = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_options(cls, table: Any) -> Any:
        for key in table if isinstance(table, dict) else ():
            if key not in ("kind", "options"):
                near = did_you_mean(str(table.get("kind")), KINDS)
                raise ValueError(
                    f"kind {table.get('kind')!r} is none of Atoll's, whose key {key!r} could be, {near}"
                    " (what an extension's takes is in options)"
                )
        return table


def _kind(table: Any) -> str | None:
    """The tag of a partition; a value that is no table gets "iid", whose model then reports the error."""
    if isinstance(table, Mapping) and "kind" not in table:
        return None
    kind = table.get("kind") if isinstance(table, Mapping) else getattr(table, "kind", "iid")
    return kind if kind in KINDS else OTHER


Partition = Annotated[
    Annotated[Iid, Tag("iid")]
    | Annotated[Dirichlet, Tag("dirichlet")]
    | Annotated[Pathological, Tag("pathological")]
    | Annotated[Natural, Tag("natural")]
    | Annotated[Resampled, Tag("resampled")]
    | Annotated[OtherPartition, Tag(OTHER)],
    Discriminator(_kind),
]


HUB_PREFIX = "hf:"
"""The prefix of a data set on the Hugging Face Hub in `data.source`."""

_ON_HUB = re.compile(rf"{HUB_PREFIX}[\w.-]+(/[\w.-]+)?", re.ASCII)


class DataSection(Section):
    """`[data]`: where examples come from; real clients use their own `--data` instead."""

    source: str
    revision: str | None = None
    subset: str | None = None
    options: Options = Field(default_factory=dict)
    partition: Partition = Iid()
    text: str | None = None
    image: str | None = None
    label: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    time_format: str | None = None
    bits: Annotated[
        int | None,
        Field(ge=8, le=16),
        Excludes("window", "for each says which values become black and white"),
    ] = None
    window: tuple[FiniteFloat, FiniteFloat] | None = None
    classes: tuple[str, ...] | None = None
    test: str | None = None
    test_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.2
    validation_fraction: Annotated[float, Field(ge=0, le=10**9, allow_inf_nan=False)] = 0.1
    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    fold: Annotated[int, Field(ge=0), Needs("folds")] = 0
    shots: Count | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether the source is the name of a data set on the Hugging Face Hub."""
        return self.source.startswith(HUB_PREFIX)

    @property
    def named_columns(self) -> dict[str, str]:
        """The names of columns in the job, by the dotted key that sets each."""
        columns = {f"data.{role}": getattr(self, role) for role in ("text", "image", "label")}
        others = {f"data.columns.{role}": column for role, column in self.columns.items()}
        return {key: column for key, column in (columns | others).items() if column is not None}

    @property
    def keeps_back(self) -> bool:
        """Whether clients hold back examples for validation."""
        return self.validation_fraction > 0 or self.folds is not None

    @field_validator("validation_fraction")
    @classmethod
    def _from_one_on_it_counts(cls, value: float) -> float:
        if value >= 1 and not value.is_integer():
            raise ValueError(f"expected a fraction below 1, or how many examples, found {value:g}")
        return value

    @field_validator("time_format")
    @classmethod
    def _time_format_can_be_read(cls, time_format: str | None) -> str | None:
        try:
            if time_format is not None:
                datetime.strptime(datetime(2024, 3, 1).strftime(time_format), time_format)
        except ValueError as error:
            raise ValueError(f"{error}; expected a format of strptime, such as '%d.%m.%Y %H:%M'") from None
        if time_format is not None and "%" not in time_format:
            raise ValueError(
                f"expected a format of strptime, such as '%d.%m.%Y %H:%M', found {time_format!r}"
            )
        return time_format

    @model_validator(mode="after")
    def _the_hub_has_what_is_named(self) -> DataSection:
        if self.is_on_hub and not _ON_HUB.fullmatch(self.source):
            raise ValueError(f"source: expected {HUB_PREFIX}OWNER/NAME, found {self.source!r}")
        for key in ("revision", "subset"):
            if getattr(self, key) is not None and not self.is_on_hub:
                raise ValueError(
                    f"{key}: is of a data set on the Hub; expected none with source = {self.source!r}"
                )
        return self

    @model_validator(mode="after")
    def _a_window_has_two_ends(self) -> DataSection:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window: expected [low, high] with low below high, found {list(self.window)}")
        return self

    @model_validator(mode="after")
    def _fold_is_one_of_the_folds(self) -> DataSection:
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(
                f"fold: expected 0 to {self.folds - 1} with folds = {self.folds}, found {self.fold}"
            )
        return self


class BackboneSection(Section):
    """`[backbone]`: the pretrained network and how its inputs are prepared."""

    name: str
    weights: str = "pretrained"
    offline: bool = False
    max_tokens: Annotated[int, Field(ge=4, le=8192)] = 128
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    pool: Literal["mean", "first"] = "mean"
    channels_last: bool = False
    compile: Annotated[bool, Needs("tune.method", ("head",))] = False
    prune: Annotated[float, Field(gt=0, le=0.95)] | None = None
    prune_kind: Annotated[Literal["magnitude", "structured"] | None, Needs("prune")] = None
    options: Options = Field(default_factory=dict)

    @property
    def pruning(self) -> Literal["magnitude", "structured"]:
        """How the backbone is pruned if `prune` is set."""
        return self.prune_kind or "magnitude"


class StrategySection(Section):
    """`[strategy]`: how updates are merged; which parameters apply depends on the name."""

    name: str = "fedavg"
    lr: Positive | None = None
    lr_schedule: LrScheduleKind | None = None
    lr_warmup: Annotated[Count | None, OF_A_SCHEDULE] = None
    lr_step: Annotated[Count | None, OF_STEPS] = None
    lr_decay: Annotated[Between | None, OF_STEPS] = None
    momentum: Decay | None = None
    beta1: Decay | None = None
    beta2: Decay | None = None
    tau: Positive | None = None
    proximal_mu: NotNegative | None = None
    options: Options | None = None

    @model_validator(mode="after")
    def _a_schedule_has_what_it_uses(self) -> StrategySection:
        check_lr_schedule(self)
        return self

    @property
    def keeps_client_state(self) -> bool:
        """Whether clients keep tensors of the strategy from round to round."""
        return self.name in WITH_CLIENT_STATE

    @property
    def keeps_last_model(self) -> bool:
        """Whether clients keep the model with which their last round ended."""
        return self.name == "moon"

    @property
    def has_inner_steps(self) -> bool:
        """Whether each local step first takes inner steps, which are then undone."""
        return self.name in ("per-fedavg", "pfedme")

    @property
    def makes_clusters(self) -> bool:
        """Whether each cluster of clients has a model of its own."""
        return self.name == "ifca"

    @property
    def gives_steps(self) -> bool:
        """Whether the server gives each client its number of local steps, and merges clients in groups."""
        return self.name == "fedcompass"

    @property
    def sends_losses(self) -> bool:
        """Whether clients send the loss of the received model on their data."""
        return self.name in SENDS_LOSSES


class Job(Section):
    """A whole job. Two jobs are the same if and only if their hashes (`hash`) are equal."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    task: TaskSection
    data: DataSection
    backbone: BackboneSection
    tune: TuneSection = TuneSection()
    train: TrainSection = TrainSection()
    federation: FederationSection = FederationSection()
    strategy: StrategySection = StrategySection()
    privacy: PrivacySection = PrivacySection()
    evaluate: EvaluateSection = EvaluateSection()
    personal: PersonalSection = PersonalSection()
    attack: AttackSection = AttackSection()

    @model_validator(mode="after")
    def _measuring_closed_forms_and_own_parts_make_sense(self) -> Job:
        check_measuring(self)
        check_closed_form(self)
        check_personal(self)
        check_inner_steps(self)
        check_client_state(self)
        check_last_models(self)
        check_clusters(self)
        check_attack(self)
        check_training(self)
        check_weights(self)
        check_vote(self)
        check_selection(self)
        check_losses_may_be_sent(self)
        check_asynchronous(self)
        check_lora_merge(self)
        check_seeds(self)
        return self

    @model_validator(mode="after")
    def _what_is_pruned_stays_pruned(self) -> Job:
        by_magnitude = self.backbone.prune is not None and self.backbone.pruning == "magnitude"
        if by_magnitude and self.tune.method == "lora":
            raise ValueError(
                "backbone.prune_kind: LoRA's factors would fill what magnitude pruning left out;"
                " expected 'structured', or another tune.method"
            )
        return self

    @model_validator(mode="after")
    def _schedule_can_be_kept(self) -> Job:
        if not self.tune.then:
            return self
        for key, is_set in (
            ("privacy.unit", bool(self.privacy.units)),
            ("federation.secure_aggregation", self.federation.secure_aggregation),
            ("federation.compression", self.feeds_errors_back and self.personal.keep is None),
            (f"strategy.name = {self.strategy.name!r}", self.strategy.keeps_client_state),
            ("train.teacher", self.train.teacher is not None),
            ("backbone.prune", self.backbone.prune is not None),
            ("personal.keep", self.personal.keep is not None),
        ):
            if is_set:
                raise ValueError(f"tune.then: what is tuned can't change on the way with {key}; remove one")
        waits = any(later.patience is not None for later in self.tune.then)
        if waits and not self.data.keeps_back:
            raise ValueError(
                "tune.then: clients keep nothing back to see progress stall by; expected"
                " data.validation_fraction above 0, or after instead of patience"
            )
        for stage, later in zip(self.stages, self.stages[1:], strict=False):
            if not is_superset(stage.tune, later.tune):
                raise ValueError(
                    f"tune.then: {later.tune.description} would leave behind what {stage.tune.description}"
                    " tuned; expected head, then last-k or lora, then more layers or full"
                )
        return self

    @model_validator(mode="after")
    def _privacy_can_be_kept(self) -> Job:
        check_promises(self)
        return self

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether the backbone is frozen, and its inputs in training are known in advance."""
        return self.tune.method == "head" and (not self.train.augment or self.train.cached_views is not None)

    @cached_property
    def stages(self) -> tuple[Job, ...]:
        """The job in each stage of its tuning schedule, with that stage's `tune` and `lr`."""
        if not self.tune.then:
            return (self,)
        first = self.model_copy(update={"tune": self.tune.model_copy(update={"then": ()})})
        return (first, *(_in_stage(first, later) for later in self.tune.then))

    @property
    def has_client_state(self) -> bool:
        """Whether clients store anything between rounds."""
        strategy = self.strategy
        keeps_state = strategy.keeps_client_state or strategy.keeps_last_model
        example = self.privacy.promise("example")
        follows_norms = example is not None and example.clipping == "adaptive"
        return self.feeds_errors_back or self.personal.keep is not None or keeps_state or follows_norms

    @property
    def feeds_errors_back(self) -> bool:
        """Whether clients add the error of compression to their next updates (error feedback)."""
        return self.federation.compression is not None and self.federation.error_feedback

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Job:
        """Read a job file, apply overrides (`key=value`), and validate it.

        Paths in the file are relative to its folder; in the job they are absolute.

        Raises:
            ConfigError: the file or a key is invalid; one line that names the file and the key.
        """
        table = read_job(path)
        for override in overrides:
            apply_override(table, override)
        return cls.parse(table, origin=str(path), folder=path.parent)

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, origin: str, folder: Path | None = None) -> Job:
        """Validate a job given as a mapping; `origin` is its name in error messages.

        With `folder`, relative paths are resolved against it.

        Raises:
            ConfigError: a key is invalid; one line that names it.
        """
        try:
            job = cls.model_validate_json(json.dumps(table, default=str))
        except ValidationError as error:
            raise ConfigError(explain(error, cls, origin)) from None
        return job if folder is None else with_absolute_paths(job, folder, origin)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job from its `canonical` text.

        Raises:
            ConfigError: the text is no valid job.
        """
        return _read_back(text)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Job:
        """A copy with some tables replaced, without values cached from the old ones."""
        copy = super().model_copy(update=update, deep=deep)
        for derived in ("canonical", "hash", "stages"):
            copy.__dict__.pop(derived, None)
        return copy

    @cached_property
    def canonical(self) -> str:
        """The job as JSON with all defaults written out and keys sorted."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of `canonical`, in hex."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def _in_stage(first: Job, later: TuneStage) -> Job:
    tune = TuneSection(
        hidden=first.tune.hidden, **{key: getattr(later, key) for key in TuneSection.tuned_keys()}
    )
    if tune.method == "lora" and tune.head is None:
        # What was tuned before stays tuned.
        tune = tune.model_copy(update={"head": "trained"})
    lr = first.train.lr if later.lr is None else later.lr
    return first.model_copy(update={"tune": tune, "train": first.train.model_copy(update={"lr": lr})})


@lru_cache(maxsize=16)
def _read_back(text: str) -> Job:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"job: cannot be read ({error})"[:200]) from None
    if not isinstance(table, dict):
        raise ConfigError("job: cannot be read, expected a JSON object")
    return Job.parse(table, origin="job")
