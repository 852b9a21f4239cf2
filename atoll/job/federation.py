"""`[federation]`: who takes part in a round, and how what they send travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from atoll.job.privacy import uses_secure_aggregation
from atoll.job.section import Count, Positive, Rate, Section

Scheme = Literal["fp16", "int8", "int4", "top-k"]
"""How an update is compressed."""

if TYPE_CHECKING:
    from atoll.job.job import Job


class FederationSection(Section):
    """`[federation]`: who takes part in a round, and how what they send travels."""

    clients: Count = 20
    cohort: Count | None = None
    cohort_rate: Rate | None = None
    concurrency: Count | None = None
    order: Literal["virtual", "arrival"] = "virtual"
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    quorum: Rate = 0.5
    round_timeout: Positive = 3600.0
    wait: Positive = 600.0
    devices: str | None = None
    deadline: Positive | None = None
    over_sampling: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 1.0
    secure_aggregation: bool = False
    secure_threshold: Rate | None = None
    compression: Scheme | None = None
    compression_top_k: Rate = 0.01
    error_feedback: bool = True
    weights: Literal["examples", "equal", "capped"] | None = None
    weight_cap: Count | None = None

    @model_validator(mode="after")
    def _compression_has_what_it_uses(self) -> FederationSection:
        share = type(self).model_fields["compression_top_k"].default
        if self.compression_top_k != share and self.compression != "top-k":
            raise ValueError("compression_top_k has no meaning without compression = 'top-k': remove it")
        if not self.error_feedback and self.compression is None:
            raise ValueError("error_feedback has no meaning without compression: remove it")
        return self

    @model_validator(mode="after")
    def _a_cap_is_of_capped_weights(self) -> FederationSection:
        if self.weight_cap is not None and self.weights != "capped":
            raise ValueError("weight_cap has no meaning without weights = 'capped': remove it")
        if self.weight_cap is None and self.weights == "capped":
            raise ValueError("weights: 'capped' needs weight_cap, the most that a client may weigh")
        return self

    def merge_weight(self, examples: int) -> int:
        """What an update of so many examples weighs in the mean; one of none weighs nothing.

        >>> FederationSection(weights="capped", weight_cap=100).merge_weight(250)
        100
        """
        match self.weights:
            case "equal":
                return min(examples, 1)
            case "capped":
                return min(examples, self.weight_cap or examples)
        return examples

    @model_validator(mode="after")
    def _time_is_simulated_with_devices(self) -> FederationSection:
        for key, given in (
            ("deadline", self.deadline is not None),
            ("over_sampling", self.over_sampling > 1),
        ):
            if given and self.devices is None:
                raise ValueError(f"{key} is in simulated time: it needs devices, a profile of the clients'")
        if self.over_sampling > 1 and self.cohort is None:
            raise ValueError("over_sampling goes with cohort, the number of updates that a round waits for")
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> FederationSection:
        if self.cohort is not None and self.cohort_rate is not None:
            raise ValueError("cohort and cohort_rate exclude each other: keep one")
        if self.cohort is not None and self.cohort > self.clients:
            raise ValueError(f"cohort must be at most clients = {self.clients}, found {self.cohort}")
        return self


SENDS_LOSSES = ("qffl", "afl")
"""Strategies that weigh clients by their losses of the model that they received."""


def check_losses_may_be_sent(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where clients can't send such a loss.

    Client-level privacy and secure sums refuse these strategies by themselves: `atoll.job.privacy`.
    """
    name = job.strategy.name
    if not job.strategy.sends_losses:
        return
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name} needs each client's loss, which no noise protects; expected another"
            f" strategy with privacy.unit = {job.privacy.unit!r}"
        )
    if job.personal.splits:
        raise ValueError(
            f"personal.keep: {name} weighs clients by the loss of the one model that all share; expected none"
            f" or 'mixture', found {job.personal.keep!r}"
        )


WEIGHTED = (
    "fedavg", "fedavgm", "fedprox", "fedadagrad", "fedadam", "fedyogi", "diloco", "fednova", "fedexp",
)  # fmt: skip
"""Strategies that take a weighted mean of the updates."""


def check_weights(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where the merge doesn't weigh clients that way."""
    weights = job.federation.weights
    if weights is None:
        return
    if job.strategy.name not in WEIGHTED:
        raise ValueError(
            f"federation.weights: {job.strategy.name} has a rule of its own for what an update weighs;"
            f" expected none, or one of {', '.join(WEIGHTED)}"
        )
    if job.privacy.units and weights != "equal":
        raise ValueError(
            "federation.weights: under a promise clients weigh the same, for numbers of examples are private"
            f" and would break the bound; expected 'equal' or none, found {weights!r}"
        )


ASYNCHRONOUS = ("fedbuff", "fedasync")
"""Strategies that merge updates of models that are not the last one."""


def is_asynchronous(job: Job) -> bool:
    """Whether clients go on working while others' updates are merged."""
    return job.federation.concurrency is not None


def check_asynchronous(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where a job can't have such rounds."""
    federation, name = job.federation, job.strategy.name
    if federation.order != "virtual" and federation.concurrency is None:
        raise ValueError("federation.order has no meaning without concurrency: remove it")
    if name not in ASYNCHRONOUS:
        if federation.concurrency is not None:
            raise ValueError(
                f"strategy.name: federation.concurrency lets updates be late; expected one of"
                f" {', '.join(ASYNCHRONOUS)}, which weigh them, found {name!r}"
            )
        return
    if federation.concurrency is None:
        raise ValueError(
            f"federation.concurrency: missing; {name} needs to know how many clients work at a time, from"
            " federation.cohort to federation.clients"
        )
    _check_sizes(job, federation.concurrency)
    _check_company(job)


def _check_sizes(job: Job, concurrency: int) -> None:
    federation, name = job.federation, job.strategy.name
    if federation.cohort is None or (name == "fedasync" and federation.cohort != 1):
        wanted = "1, for every update is merged as it comes" if name == "fedasync" else "the buffer's size"
        raise ValueError(f"federation.cohort: with {name} it is {wanted}; found {federation.cohort}")
    if not federation.cohort <= concurrency <= federation.clients:
        raise ValueError(
            f"federation.concurrency: expected from federation.cohort = {federation.cohort} to"
            f" federation.clients = {federation.clients}, found {concurrency}"
        )


def _check_company(job: Job) -> None:
    """What has no meaning, or no proof, where clients of several starts are merged together."""
    federation, promise = job.federation, job.privacy.promise("client")
    for key, given, why in (
        ("federation.secure_aggregation", uses_secure_aggregation(job),
         "the members of a secure sum work at the same time"),
        ("federation.deadline", federation.deadline is not None, "nobody is waited for"),
        ("federation.over_sampling", federation.over_sampling > 1, "concurrency says how many are asked"),
        ("federation.error_feedback", job.feeds_errors_back,
         "what compression lost belongs to a model that is gone"),
        ("personal.keep", job.personal.keep is not None, "kept parts fit the model of their own round"),
        ("tune.then", bool(job.tune.then), "clients at work would send what is no longer tuned"),
        ("tune.lora_merge", job.tune.lora_merge is not None, "factors of several starts have no common one"),
        ("tune.lora_ranks", job.tune.lora_ranks is not None, "factors of several starts have no common one"),
        ("privacy.mechanism", promise is not None and promise.bands is not None,
         "rounds of a client lie as far apart as it takes"),
        ("privacy.audit", job.privacy.audit, "its canaries take part in every round"),
        ("federation.devices", federation.devices is not None and promise is not None,
         "how long a client takes tells how many examples it has"),
    ):  # fmt: skip
        if given:
            raise ValueError(f"{key}: with strategy.name = {job.strategy.name!r} {why}; leave it out")
