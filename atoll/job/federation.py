"""`[federation]`: which clients take part in a round, and how their updates are sent and weighted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from atoll.job.privacy import uses_secure_aggregation
from atoll.job.section import Count, Excludes, Needs, NotNegative, Positive, Rate, Section

Scheme = Literal["fp16", "int8", "int4", "top-k", "sign"]
"""How an update is compressed."""

Selection = Literal["uniform", "by-size", "power-of-choice", "oort"]
"""How a round's clients are sampled."""

if TYPE_CHECKING:
    from atoll.job.job import Job


class OortSection(Section):
    """`[federation.oort]`: parameters of Oort's client selection, explained in `server/selection/oort.py`.

    `explore` is the fraction of the first round's cohort drawn from clients that have sent nothing yet.
    `seconds` is the longest duration without a penalty, in virtual seconds; None: the median client's.
    `speeds` are in examples per virtual second, by client; other clients' are drawn from 1 to `speed_spread`.
    """

    explore: Rate = 0.9
    explore_decay: Rate = 0.98
    explore_least: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.2
    cutoff: Rate = 0.95
    clip: Rate = 0.95
    penalty: NotNegative = 2.0
    window: Count = 20
    seconds: Positive | None = None
    seconds_step: NotNegative = 0.5
    speed_spread: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] = 10.0
    speeds: dict[str, Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]] | None = None

    @model_validator(mode="after")
    def _exploring_falls(self) -> OortSection:
        if self.explore_least > self.explore:
            raise ValueError(
                f"explore_least: expected at most explore = {self.explore:g}, found {self.explore_least:g}"
            )
        return self


IN_SIMULATED_TIME = Needs("devices", why="a profile of the clients' by which time is simulated")


class FederationSection(Section):
    """`[federation]`: which clients take part in a round, and how their updates are sent and weighted."""

    clients: Count = 20
    cohort: Annotated[
        Count | None, Excludes("cohort_rate", "for a round's clients are so many, or drawn")
    ] = None
    cohort_rate: Rate | None = None
    selection: Selection = "uniform"
    candidates: Annotated[Count | None, Needs("selection", ("power-of-choice",))] = None
    oort: Annotated[OortSection | None, Needs("selection", ("oort",))] = None
    concurrency: Count | None = None
    order: Annotated[Literal["virtual", "arrival"], Needs("concurrency")] = "virtual"
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    quorum: Rate = 0.5
    round_timeout: Positive = 3600.0
    wait: Positive = 600.0
    devices: str | None = None
    deadline: Annotated[Positive | None, IN_SIMULATED_TIME] = None
    over_sampling: Annotated[
        float,
        Field(ge=1, le=100, allow_inf_nan=False),
        IN_SIMULATED_TIME,
        Needs("cohort", why="the number of updates that a round waits for"),
    ] = 1.0
    secure_aggregation: bool = False
    secure_threshold: Rate | None = None
    compression: Scheme | None = None
    compression_top_k: Annotated[Rate, Needs("compression", ("top-k",))] = 0.01
    error_feedback: Annotated[bool, Needs("compression")] = True
    weights: Literal["examples", "equal", "capped"] | None = None
    weight_cap: Annotated[Count | None, Needs("weights", ("capped",))] = None

    @model_validator(mode="after")
    def _a_cap_is_given(self) -> FederationSection:
        if self.weight_cap is None and self.weights == "capped":
            raise ValueError("weights: 'capped' needs weight_cap, the most that a client may weigh")
        return self

    def merge_weight(self, examples: int) -> int:
        """The weight in the mean of an update from this many examples; 0 for none.

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
    def _cohort_fits(self) -> FederationSection:
        if self.cohort is not None and self.cohort > self.clients:
            raise ValueError(f"cohort must be at most clients = {self.clients}, found {self.cohort}")
        return self

    @model_validator(mode="after")
    def _selection_has_what_it_uses(self) -> FederationSection:
        if self.selection == "uniform":
            return self
        if self.cohort is None:
            rate = "none" if self.cohort_rate is None else f"cohort_rate = {self.cohort_rate:g}"
            raise ValueError(
                f"selection: {self.selection!r} chooses a number of clients; expected cohort, found {rate}"
            )
        if self.selection == "by-size" and self.over_sampling > 1:
            raise ValueError(
                "over_sampling: the first to answer aren't drawn by size alone; expected 1 with selection ="
                f" 'by-size', found {self.over_sampling:g}"
            )
        invited = math.ceil(self.cohort * self.over_sampling - 1e-9)
        if self.candidates is not None and not invited <= self.candidates <= self.clients:
            raise ValueError(
                f"candidates: expected at least the {invited} that a round asks, and at most clients ="
                f" {self.clients}, found {self.candidates}"
            )
        return self

    @property
    def chooses_by_losses(self) -> bool:
        """Whether the cohort depends on the training losses that clients report."""
        return self.selection in ("power-of-choice", "oort")


SENDS_LOSSES = ("qffl", "afl")
"""Strategies that weight clients by the loss of the received model on their data."""


def check_losses_may_be_sent(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the strategy needs losses that can't be sent.

    That client-level privacy and secure sums exclude these strategies is checked in `atoll.job.privacy`.
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


def check_vote(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job doesn't work with signSGD's vote.

    That client-level privacy and secure sums exclude it is checked in `atoll.job.privacy`.
    """
    federation = job.federation
    if job.strategy.name != "signsgd":
        return
    if federation.compression != "sign":
        raise ValueError(
            "federation.compression: signsgd counts signs, which clients send in a bit each; expected 'sign',"
            f" found {federation.compression!r}"
        )
    if federation.error_feedback:
        raise ValueError(
            "federation.error_feedback: signsgd's steps are of one length, so that what a message lost isn't"
            " what the model lacks; expected false, found true"
        )


WEIGHTED = (
    "fedavg", "fedavgm", "fedprox", "fedadagrad", "fedadam", "fedyogi", "diloco", "fednova", "fedexp",
    "moon",
)  # fmt: skip
"""Strategies that use a weighted mean of the updates."""


def check_weights(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the strategy can't weight clients in this way."""
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


RELEASES = {
    "by-size": "how many examples each client has",
    "power-of-choice": "each client's examples and training loss",
    "oort": "each client's examples and training loss",
}
"""The information on which each selection depends, and which it therefore reveals."""


def check_selection(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if clients can't be selected in this way."""
    federation, name = job.federation, job.strategy.name
    rule = federation.selection
    if rule == "uniform":
        return
    _check_selection_tells_nothing_hidden(job)
    if is_asynchronous(job):
        raise ValueError(
            "federation.selection: with federation.concurrency clients start one by one, as places get free;"
            f" expected 'uniform', found {rule!r}"
        )
    if rule == "by-size":
        _check_by_size(job)
    if federation.chooses_by_losses and job.strategy.sends_losses:
        raise ValueError(
            f"federation.selection: {name} weighs clients that were drawn with even chances by their losses;"
            f" expected 'uniform', found {rule!r}"
        )


def _check_selection_tells_nothing_hidden(job: Job) -> None:
    rule = job.federation.selection
    reads = RELEASES[rule]
    if "client" in job.privacy.units:
        raise ValueError(
            f"federation.selection: who takes part would depend on {reads}, and a client's promise counts on"
            f" chances that depend on no data; expected 'uniform' with privacy.unit ="
            f" {job.privacy.unit!r}, found {rule!r}"
        )
    if job.privacy.units:
        raise ValueError(
            f"federation.selection: who takes part would tell of {reads}, which no noise protects; expected"
            f" 'uniform' with privacy.unit = {job.privacy.unit!r}, found {rule!r}"
        )
    if job.federation.secure_aggregation:
        raise ValueError(
            f"federation.selection: needs {reads}, which a secure sum hides; expected 'uniform' with"
            f" federation.secure_aggregation, found {rule!r}"
        )


def _check_by_size(job: Job) -> None:
    if job.strategy.name not in WEIGHTED:
        raise ValueError(
            f"federation.selection: 'by-size' weighs a client by how often it was drawn, and"
            f" {job.strategy.name} has a rule of its own; expected one of {', '.join(WEIGHTED)}"
        )
    for key, value in (
        ("federation.weights", job.federation.weights),
        ("tune.head_init", job.tune.head_init),
    ):
        if value is not None:
            raise ValueError(
                f"{key}: with federation.selection = 'by-size' the draw counts sizes already; expected none,"
                f" found {value!r}"
            )


ASYNCHRONOUS = ("fedbuff", "fedasync", "fedcompass")
"""Strategies that merge updates which started from older models."""


def is_asynchronous(job: Job) -> bool:
    """Whether clients go on training while other clients' updates are merged."""
    return job.federation.concurrency is not None


def check_asynchronous(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job can't have asynchronous rounds."""
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
            f" {'1' if job.strategy.gives_steps else 'federation.cohort'} to federation.clients"
        )
    _check_sizes(job, federation.concurrency)
    _check_company(job)


def _check_sizes(job: Job, concurrency: int) -> None:
    federation, name = job.federation, job.strategy.name
    if job.strategy.gives_steps:
        _check_groups(job, concurrency)
        return
    if federation.cohort is None or (name == "fedasync" and federation.cohort != 1):
        wanted = "1, for every update is merged as it comes" if name == "fedasync" else "the buffer's size"
        raise ValueError(f"federation.cohort: with {name} it is {wanted}; found {federation.cohort}")
    if not federation.cohort <= concurrency <= federation.clients:
        raise ValueError(
            f"federation.concurrency: expected from federation.cohort = {federation.cohort} to"
            f" federation.clients = {federation.clients}, found {concurrency}"
        )


def _check_groups(job: Job, concurrency: int) -> None:
    federation, name = job.federation, job.strategy.name
    for key, value in (("cohort", federation.cohort), ("cohort_rate", federation.cohort_rate)):
        if value is not None:
            raise ValueError(
                f"federation.{key}: {name} merges groups as they are done; expected none, found {value}"
            )
    if concurrency > federation.clients:
        raise ValueError(
            f"federation.concurrency: expected from 1 to federation.clients = {federation.clients}, found"
            f" {concurrency}"
        )
    for key in ("epochs", "steps"):
        if job.train.is_given(key):
            raise ValueError(
                f"train.{key}: {name} gives each client a number of local steps, from options.min_steps to"
                f" options.max_steps; leave it out"
            )
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name} gives each client another number of local steps, and ledgers are charged"
            f" for one that the job says; expected another strategy with privacy.unit = {job.privacy.unit!r}"
        )


def _check_company(job: Job) -> None:
    """Raises ValueError for keys that don't work, or have no proof, with updates from different starts."""
    federation, promise = job.federation, job.privacy.promise("client")
    for key, is_set, why in (
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
        if is_set:
            raise ValueError(f"{key}: with strategy.name = {job.strategy.name!r} {why}; leave it out")
