"""`[privacy]`: whose data is protected, where noise is added, and the guarantee."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import model_validator

from atoll.job.closed_form import is_the_only_release
from atoll.job.section import Between, Count, Excludes, Needs, Positive, Rate, Section

if TYPE_CHECKING:
    from atoll.job.job import Job

Unit = Literal["example", "client"]
Value = TypeVar("Value")

PLACES: dict[Unit, tuple[str, ...]] = {
    "example": ("client", "distributed"),
    "client": ("server", "distributed"),
}
"""Where noise can be added for each unit; the first is the default."""

FEWEST_IN_A_SUM = 3

SHARED_EXAMPLES = (
    "lets clients share examples: epsilon would be spent on one at each of them, and the claim is of a single"
    " time; expected a partition that deals each example once with example-level privacy"
)

MERGED_BY_MEAN = (
    "fedavg", "fedavgm", "fedprox", "fedadagrad", "fedadam", "fedyogi", "diloco", "per-fedavg", "pfedme",
    "fedbuff",
)  # fmt: skip
"""Strategies that use only the mean of the updates."""


OF_ADAPTIVE_CLIPPING = Needs("clipping", ("adaptive",))


class DpGuarantee(Section):
    """The differential privacy guarantee for one unit, and the mechanism that provides it.

    Either `epsilon` is given, and the noise is calibrated to it, or `noise_multiplier`, and epsilon follows.
    `sampling_rate` is the rate of Poisson sampling of examples in every local step. With `mechanism`
    'banded', noise is correlated over `bands` rounds.
    """

    where: Literal["client", "server", "distributed"] | None = None
    epsilon: Positive | None = None
    delta: Between | None = None
    noise_multiplier: Positive | None = None
    clipping_norm: Positive = 1.0
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: Annotated[Between, OF_ADAPTIVE_CLIPPING] = 0.5
    clipping_lr: Annotated[Positive, OF_ADAPTIVE_CLIPPING] = 0.2
    count_deviation: Annotated[Positive | None, OF_ADAPTIVE_CLIPPING] = None
    sampling_rate: Rate | None = None
    steps: Count | None = None
    mechanism: Literal["independent", "banded"] = "independent"
    bands: Annotated[Count | None, Needs("mechanism", ("banded",))] = None

    @property
    def separation(self) -> int:
        """The number of consecutive rounds in which a client takes part at most once; 1 without a limit."""
        return self.bands or 1


PROMISED = ("example", "client", "both")
OF_A_PROMISE = Needs("unit", PROMISED)


class PrivacySection(DpGuarantee):
    """`[privacy]`: one guarantee, or with `unit = "both"` two, in tables of their own.

    `seeded_noise` is reproducible and therefore protects nobody: it is for simulations. With `audit`, a
    simulation is attacked at its end, and reports the lower bound on epsilon that the attack proves.
    `ghost_norms` clips examples' gradients without laying them out, in less memory.
    """

    unit: Literal["none", "example", "client", "both"] = "none"
    seeded_noise: Annotated[bool, OF_A_PROMISE] = False
    audit: Annotated[
        bool,
        Needs("unit", PROMISED, why="which claims nothing", otherwise="attack the run with atoll audit"),
        Excludes("train.teacher", "for such a run can't be attacked"),
        Excludes("train.lr_schedule", "for such a run can't be attacked"),
        Excludes("train.layer_decay", "for such a run can't be attacked"),
    ] = False
    ghost_norms: Annotated[bool, Needs("unit", ("example", "both"))] = False
    example: DpGuarantee | None = None
    client: DpGuarantee | None = None

    @model_validator(mode="after")
    def _promises_are_where_they_belong(self) -> PrivacySection:
        for name in ("example", "client"):
            is_set = getattr(self, name) is not None
            if is_set and self.unit != "both":
                raise ValueError(f"{name} is for unit = 'both': write its keys into [privacy] itself")
            if not is_set and self.unit == "both":
                raise ValueError(
                    f"unit = 'both' needs the tables [privacy.example] and [privacy.client]; no {name}"
                )
        if self.unit in ("none", "both"):
            self._refuse_own_keys()
        return self

    def _refuse_own_keys(self) -> None:
        for key in DpGuarantee.model_fields:
            if self.is_given(key):
                where = "[privacy.example] and [privacy.client]" if self.unit == "both" else "nothing"
                raise ValueError(f"{key} has no meaning with unit = {self.unit!r}: it belongs to {where}")

    def promise(self, unit: Unit) -> DpGuarantee | None:
        """The guarantee for this unit; None if there is none."""
        if self.unit == "both":
            return self.example if unit == "example" else self.client
        return self if self.unit == unit else None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that have a guarantee."""
        both: tuple[Unit, ...] = ("example", "client")
        return tuple(unit for unit in both if self.promise(unit) is not None)


def check_promises(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job can't provide its guarantees."""
    for unit in job.privacy.units:
        promise = job.privacy.promise(unit)
        assert promise is not None
        prefix = "privacy" if job.privacy.unit == unit else f"privacy.{unit}"
        _check_noise(promise, prefix)
        _check_place(promise, prefix, unit)
        _check_delta(promise, prefix, unit, job)
        _check_sampling(promise, prefix, unit, job)
        _check_mechanism(promise, prefix, unit, job)
    for key in job.train.autograd_only_keys if "example" in job.privacy.units else ():
        raise ValueError(
            f"train.{key}: an example's gradient is clipped as it is, from one pass in full precision, and"
            " noised once a step; expected no such key under example-level privacy"
        )
    if "example" in job.privacy.units and job.data.partition.kind == "resampled":
        raise ValueError(f"data.partition: 'resampled' {SHARED_EXAMPLES}")
    if "example" in job.privacy.units and job.data.validation_fraction >= 1:
        raise ValueError(
            "data.validation_fraction: a count, in which examples depend on one another; expected a fraction"
            f" below 1 under example-level privacy, found {job.data.validation_fraction:g}"
        )
    if uses_secure_aggregation(job):
        _check_secure_sums(job)
    elif job.federation.secure_threshold is not None and not job.privacy.units:
        raise ValueError("federation.secure_threshold has no meaning without secure_aggregation: remove it")
    if "client" in job.privacy.units or uses_secure_aggregation(job):
        _check_merging(job)
    _check_what_is_measured(job)


def noise_locations(job: Job) -> tuple[str, ...]:
    """The place where noise is added, for each unit with a guarantee."""
    return tuple(guarantee_of(job, unit).where or PLACES[unit][0] for unit in job.privacy.units)


def charges_clients(job: Job) -> bool:
    """Whether clients add noise themselves, and charge each round to a ledger of their own."""
    return any(where != "server" for where in noise_locations(job))


def guarantee_of(job: Job, unit: Unit) -> DpGuarantee:
    """The guarantee of a unit that has one."""
    promise = job.privacy.promise(unit)
    assert promise is not None
    return promise


def uses_secure_aggregation(job: Job) -> bool:
    """Whether the server sees only the sum of the updates."""
    return job.federation.secure_aggregation or "distributed" in noise_locations(job)


def _check_secure_sums(job: Job) -> None:
    if "server" in noise_locations(job):
        raise ValueError(
            "privacy.where: 'server' clips single updates, which a secure sum hides from it; expected"
            " 'distributed', or federation.secure_aggregation = false"
        )
    if noise_locations(job).count("distributed") > 1:
        raise ValueError("privacy.where: expected 'distributed' for one unit at most, found it for both")
    if job.federation.cohort_rate is not None:
        raise ValueError("federation.cohort_rate: a secure sum needs a cohort of fixed size; expected cohort")
    if expected_cohort(job) < FEWEST_IN_A_SUM:
        raise ValueError(
            f"federation: a secure sum needs {FEWEST_IN_A_SUM} clients a round, found"
            f" {expected_cohort(job):g}"
        )
    if job.federation.compression is not None:
        raise ValueError(
            "federation.compression: a secure sum adds whole numbers of one grid that all clients share, and"
            " compressed updates are on grids of their own; expected no compression, or no secure sum"
        )
    promise = job.privacy.promise("example")
    if promise is not None and promise.where == "distributed":
        _check_single_step(job)
    client = job.privacy.promise("client")
    if client is not None and client.clipping == "adaptive":
        raise ValueError("privacy.clipping: expected 'fixed' where noise is distributed, found 'adaptive'")


def _check_single_step(job: Job) -> None:
    promise, train = guarantee_of(job, "example"), job.train
    _check_step_is_the_rounds(job)
    if promise.steps not in (None, 1) or train.epochs != 1:
        raise ValueError(
            "privacy.where: 'distributed' takes one step a round; expected steps = 1 and train.epochs = 1"
        )
    if train.optimizer != "sgd" or train.momentum or train.weight_decay or job.strategy.name == "fedprox":
        raise ValueError(
            "privacy.where: 'distributed' sums gradients, and the strategy makes the step; expected"
            " train.optimizer = 'sgd' without momentum and weight_decay, and a strategy other than fedprox"
        )


def _check_step_is_the_rounds(job: Job) -> None:
    for key, is_set in (("layer_decay", job.train.layer_decay is not None),
                       ("lr_schedule_over", job.train.varies_by_step)):  # fmt: skip
        if is_set:
            raise ValueError(
                f"train.{key}: where privacy.where is 'distributed' for examples, the server makes the"
                " round's one step, at one learning rate; remove it"
            )


def _check_noise(promise: DpGuarantee, prefix: str) -> None:
    if (promise.epsilon is None) == (promise.noise_multiplier is None):
        count = "neither" if promise.epsilon is None else "both"
        raise ValueError(f"{prefix}: expected epsilon (the noise follows) or noise_multiplier, found {count}")
    if promise.delta is None:
        raise ValueError(f"{prefix}.delta: missing, expected the probability of failure, such as 1e-5")


def _check_place(promise: DpGuarantee, prefix: str, unit: Unit) -> None:
    if promise.where is not None and promise.where not in PLACES[unit]:
        known = " or ".join(map(repr, PLACES[unit]))
        raise ValueError(f"{prefix}.where: expected {known} for the unit {unit!r}, found {promise.where!r}")


def _check_delta(promise: DpGuarantee, prefix: str, unit: Unit, job: Job) -> None:
    assert promise.delta is not None
    if unit == "client":
        units, what = float(job.federation.clients), "federation.clients"
    else:
        units = job.train.batch_size / (promise.sampling_rate or 1.0)
        what = "the expected examples of a client (train.batch_size / sampling_rate)"
    if promise.delta >= 1 / units:
        raise ValueError(
            f"{prefix}.delta: expected less than 1 / {what} = {1 / units:.3g}, found {promise.delta}:"
            " otherwise giving one unit's data away would be allowed"
        )


def _check_sampling(promise: DpGuarantee, prefix: str, unit: Unit, job: Job) -> None:
    if unit == "example":
        if promise.sampling_rate is None and not is_the_only_release(job):
            raise ValueError(
                f"{prefix}.sampling_rate: missing, expected the rate of examples in a step, such as 0.05"
            )
        if promise.clipping == "adaptive":
            _check_adaptive_examples(promise, prefix, job)
    else:
        for key in ("sampling_rate", "steps"):
            if getattr(promise, key) is not None:
                raise ValueError(
                    f"{prefix}.{key} has no meaning for the unit 'client', which"
                    " federation.cohort_rate samples"
                )


def _check_adaptive_examples(promise: DpGuarantee, prefix: str, job: Job) -> None:
    """Raises ValueError where a client has no norm of its own that could follow its examples' gradients."""
    for fits, why in (
        (promise.where in (None, "client"), "with where = 'distributed', whose sums are of one norm"),
        (job.personal.keep is None, "with personal.keep, whose state takes the place of the norm's"),
        (not job.feeds_errors_back, "with compression that feeds errors back; federation.error_feedback ="
         " false goes with it"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{prefix}.clipping: expected 'fixed' {why}, found 'adaptive'")


def _check_mechanism(promise: DpGuarantee, prefix: str, unit: Unit, job: Job) -> None:
    if promise.mechanism == "independent":
        return
    mechanism = f"{prefix}.mechanism"
    for fits, expected in (
        (unit == "client", "'independent' for the unit 'example'"),
        (job.privacy.unit != "both", "'independent' with unit = 'both'"),
        (promise.where in (None, "server"), f"'independent' with where = {promise.where!r}"),
        (promise.clipping == "fixed", "'independent' with clipping = 'adaptive'"),
        (job.federation.cohort_rate is None, "'independent' with federation.cohort_rate, whose coins choose"
         " clients at any distance"),
        (not job.privacy.audit, "'independent' with privacy.audit, whose canaries take part in every round"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{mechanism}: expected {expected}, found 'banded'")
    _check_bands(promise.bands, prefix, job)


def _check_bands(bands: int | None, prefix: str, job: Job) -> None:
    federation = job.federation
    if bands is None or bands > federation.rounds:
        raise ValueError(
            f"{prefix}.bands: {'missing' if bands is None else f'found {bands}'}, expected in how many rounds"
            f" in a row a client takes part once at most, up to federation.rounds = {federation.rounds}"
        )
    invited = math.ceil((federation.cohort or federation.clients) * federation.over_sampling - 1e-9)
    if bands > 1 and invited * bands > federation.clients:
        raise ValueError(
            f"{prefix}.bands: {bands} rounds in a row need {invited * bands} different clients, {invited}"
            f" each; expected bands up to {federation.clients // invited} with federation.clients ="
            f" {federation.clients}, or a smaller federation.cohort"
        )


def _check_merging(job: Job) -> None:
    if job.strategy.name not in MERGED_BY_MEAN:
        raise ValueError(
            f"strategy.name: expected one of {', '.join(MERGED_BY_MEAN)}, found {job.strategy.name!r}:"
            " of the updates nothing can be seen but their noised or secure mean"
        )


def _check_what_is_measured(job: Job) -> None:
    in_the_clear = [name for name in job.evaluate.baselines if name != "zero_shot"]
    if job.privacy.units and in_the_clear and not job.privacy.seeded_noise:
        raise ValueError(
            f"evaluate.baselines: {', '.join(in_the_clear)} would train on the data without noise; leave"
            " it out, or set privacy.seeded_noise = true, for a simulation that protects nobody"
        )


def local_steps(job: Job) -> int:
    """A client's number of noised steps in a round: `steps`, or those of the epochs; it is public."""
    promise = job.privacy.promise("example")
    assert promise is not None
    if promise.where == "distributed" or is_the_only_release(job):
        return 1
    assert promise.sampling_rate is not None
    return promise.steps or job.train.epochs * math.ceil(1 / promise.sampling_rate - 1e-9)


def expected_cohort(job: Job) -> float:
    """The expected number of clients in a round; it is public."""
    federation = job.federation
    if federation.cohort_rate is not None:
        return federation.cohort_rate * federation.clients
    return float(federation.cohort or federation.clients)


def separation(job: Job) -> int:
    """The number of consecutive rounds in which a client takes part at most once; 1 without a limit."""
    promise = job.privacy.promise("client")
    return 1 if promise is None else promise.separation


def cohort_is_secret(job: Job) -> bool:
    """Whether cohorts must stay secret, as amplification by Poisson sampling of clients requires."""
    return "client" in job.privacy.units and job.federation.cohort_rate is not None


def unless_secret(job: Job, value: Value, instead: Value) -> Value:
    """`value`, which reveals who or how many took part in a round; `instead` if that must stay secret.

    Everything that reveals a cohort (log lines, errors, files) must be passed through this function.
    """
    return instead if cohort_is_secret(job) else value
