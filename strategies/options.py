"""The options of Atoll's own strategies, and what a job must have for them; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from atoll.errors import ConfigError
from atoll.job.extension_options import validated
from atoll.job.job import Job
from atoll.job.section import Count, NotNegative, Positive, Section


class LateOptions(Section):
    """The weights of late updates: one of Xie et al.'s three functions, with their a and b."""

    weighing: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: Positive = 0.5
    b: NotNegative = 4.0


class FedCompassOptions(LateOptions):
    """The bounds of a client's local steps, the paper's Q_min and Q_max; and the weights of late updates.

    A group is waited for `latest_factor` times as long as it is expected to take, the paper's lambda.
    """

    min_steps: Count = 20
    max_steps: Count = 100
    latest_factor: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 1.2

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> FedCompassOptions:
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps: expected at most max_steps = {self.max_steps}, found {self.min_steps}"
            )
        return self


class HostileClients(Section):
    """How many of a round's clients may be hostile (the papers' f)."""

    hostile: Annotated[int, Field(ge=0, le=1_000_000)] = 1

    needed_per_hostile: ClassVar[int] = 2
    needed_besides: ClassVar[int] = 1

    @property
    def clients_needed(self) -> int:
        """The least number of updates that a merge needs."""
        return self.needed_per_hostile * self.hostile + self.needed_besides

    @property
    def formula(self) -> str:
        """The formula of `clients_needed`, in the names of the job's keys."""
        by_hostile = "hostile" if self.needed_per_hostile == 1 else f"{self.needed_per_hostile} * hostile"
        return f"{by_hostile} + {self.needed_besides}"


class HostileOptions(HostileClients):
    """Options of hostile clients, and whether rows are mixed before the merge."""

    mixing: bool = False


class GeometricMedianOptions(HostileOptions):
    """Weiszfeld's steps, and the distance below which a weight grows no more."""

    smoothing: Positive = 1e-6
    iterations: Annotated[int, Field(ge=1, le=1000)] = 8


class KrumOptions(HostileOptions):
    """Krum needs two clients more than an honest majority."""

    needed_besides: ClassVar[int] = 3


class MultiKrumOptions(KrumOptions):
    """How many rows are averaged; clients - hostile by default."""

    selected: Count | None = None


class BulyanOptions(HostileOptions):
    """Bulyan needs more than three quarters of honest clients."""

    needed_per_hostile: ClassVar[int] = 4
    needed_besides: ClassVar[int] = 3


class NormBoundOptions(HostileOptions):
    """The L2 norm that no delta exceeds."""

    clipping_norm: Positive = 1.0


class CenteredClippingOptions(HostileOptions):
    """The L2 norm of what a client adds to the centre in a step, and the steps of a round."""

    clipping_norm: Positive = 1.0
    iterations: Annotated[int, Field(ge=1, le=1000)] = 1


class FlandersOptions(HostileClients):
    """The forecast's window and fit, how many numbers it uses, and the rule that merges the accepted rows."""

    window: Annotated[int, Field(ge=1, le=1000)] = 2
    sampled: Count = 10_000
    ridge: Positive = 1.0
    iterations: Annotated[int, Field(ge=1, le=1000)] = 100
    rule: Literal["mean", "coordinate-median", "geometric-median"] = "mean"

    needed_per_hostile: ClassVar[int] = 1


class FlTrustOptions(Section):
    """The name of the client that the server's operator trusts."""

    root: Annotated[str, Field(min_length=1, max_length=64)]


class FedExpOptions(Section):
    """The paper's epsilon, which keeps the step finite where the mean delta is zero."""

    epsilon: NotNegative = 1e-3


class ScaffoldOptions(Section):
    """How clients renew their control variates: the paper's option I or II."""

    option: Annotated[int, Field(ge=1, le=2)] = 2


class FedDynOptions(Section):
    """How strongly clients are held to the model."""

    alpha: Positive = 0.01


class QFedAvgOptions(Section):
    """The paper's q, and its L, which is 1 over the clients' learning rate by default."""

    q: Annotated[float, Field(ge=0, le=1000)] = 1.0
    lipschitz: Positive | None = None


class AflOptions(Section):
    """How far the clients' weights go in a round, the paper's gamma_lambda."""

    lambda_lr: Positive = 0.1


class PerFedAvgOptions(Section):
    """How far a client's step of adaptation goes, the paper's alpha."""

    inner_lr: Positive = 0.1


class PFedMeOptions(Section):
    """How a client's own model comes from the shared one: the paper's lambda, its alpha, and K."""

    pull: Positive = 15.0
    inner_lr: Positive = 0.05
    inner_steps: Annotated[int, Field(ge=1, le=1000)] = 5


class MoonOptions(Section):
    """What the contrast counts beside the loss, and the temperature in it: the paper's mu and tau."""

    mu: NotNegative = 1.0
    temperature: Positive = 0.5


class IfcaOptions(Section):
    """How many models there are, the paper's k."""

    clusters: Annotated[int, Field(ge=2, le=1000)] = 2


def clusters_of(job: Job) -> int:
    """The number of cluster models that the job trains; 0 for strategies without clusters."""
    if not job.strategy.makes_clusters:
        return 0
    options = validated(IfcaOptions, job.strategy.options or {}, "strategy.options")
    assert isinstance(options, IfcaOptions)
    return options.clusters


def fedcompass_options(job: Job) -> FedCompassOptions | None:
    """How many local steps the job's server may give a client; None for strategies that give none."""
    if not job.strategy.gives_steps:
        return None
    options = validated(FedCompassOptions, job.strategy.options or {}, "strategy.options")
    assert isinstance(options, FedCompassOptions)
    return options


def trusted_client(job: Job) -> str | None:
    """The trusted client, with whose update all others are compared; None for most strategies.

    Raises:
        ConfigError: the strategy needs a trusted client, and its options don't name one.
    """
    if job.strategy.name != "fltrust":
        return None
    options = validated(FlTrustOptions, job.strategy.options or {}, "strategy.options")
    assert isinstance(options, FlTrustOptions)
    return options.root


def _refuse_head_init(job: Job) -> None:
    if job.tune.head_init is not None:
        raise ConfigError(
            f"tune.head_init: adds up whatever clients send, so a hostile one decides the head; expected none"
            f" with strategy.name = {job.strategy.name!r}"
        )


def check_trusted_client(job: Job) -> None:
    """Raises ConfigError, naming the key, where the trusted client's update can't be compared with all."""
    if trusted_client(job) is None:
        return
    federation, name = job.federation, job.strategy.name
    if federation.selection != "uniform":
        raise ConfigError(
            f"federation.selection: {name} asks the trusted client in every round, and draws the others"
            f" evenly; expected 'uniform', found {federation.selection!r}"
        )
    _refuse_head_init(job)
    if (federation.cohort or federation.clients) < FEWEST_WITH_TRUST:
        key = "federation.cohort" if federation.cohort else "federation.clients"
        raise ConfigError(
            f"{key}: with {name} the trusted client is one of them and moves nothing itself; expected"
            f" at least {FEWEST_WITH_TRUST}, found {federation.cohort or federation.clients}"
        )


FEWEST_WITH_TRUST = 2

HOSTILE_OPTIONS: Mapping[str, type[HostileClients]] = {
    "coordinate-median": HostileOptions,
    "trimmed-mean": HostileOptions,
    "geometric-median": GeometricMedianOptions,
    "krum": KrumOptions,
    "multi-krum": MultiKrumOptions,
    "bulyan": BulyanOptions,
    "centered-clipping": CenteredClippingOptions,
    "norm-bound": NormBoundOptions,
    "flanders": FlandersOptions,
}
"""The options of the strategies that hold against hostile clients, by name."""


def check_hostile_clients(job: Job, options: HostileClients) -> None:
    """Check that every round has as many clients as the rule needs, and that nothing bypasses the rule.

    Raises:
        ConfigError: a round may have too few clients, or hostile ones could bypass the rule; names the key.
    """
    name, federation = job.strategy.name, job.federation
    _refuse_head_init(job)
    if federation.cohort_rate is not None:
        raise ConfigError(
            f"federation.cohort_rate: draws cohorts of any size, and {name} needs {options.clients_needed}"
            f" clients ({options.formula}); expected cohort"
        )
    if federation.chooses_by_losses:
        raise ConfigError(
            f"federation.selection: {federation.selection!r} believes what clients say of their losses, so"
            f" hostile ones would always be chosen; expected 'uniform' with strategy.name = {name!r}"
        )
    cohort = federation.cohort or federation.clients
    fewest = max(1, math.ceil(federation.quorum * cohort - 1e-9))
    if fewest < options.clients_needed:
        raise ConfigError(
            f"strategy.options.hostile: {name} needs {options.clients_needed} clients against"
            f" {options.hostile} hostile ({options.formula}), and federation.quorum ="
            f" {federation.quorum:g} lets a round count with {fewest} of {cohort}; expected fewer"
            " hostile, more clients or a larger quorum"
        )
    if isinstance(options, MultiKrumOptions) and (options.selected or 0) > fewest - options.hostile:
        raise ConfigError(
            f"strategy.options.selected: expected at most {fewest - options.hostile} of {fewest} clients with"
            f" hostile = {options.hostile}, found {options.selected}"
        )
