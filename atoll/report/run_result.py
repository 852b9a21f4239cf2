"""The result of a complete run: `result.json` as an object, and the types of its nested tables.

`RunResult` has a field for each key of the file. Nested tables stay JSON objects with the keys that their
types list, so that a line of `metrics.jsonl` and the same line in a result are one value.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, Self

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from atoll.errors import ConfigError, JobError
from atoll.system.durable_files import replace_synced
from atoll.tasks.metric_values import MetricValues

RESULT_FILE = "result.json"


class SimulatedRound(TypedDict):
    """A round in simulated time, in seconds, and how many clients did not contribute, by reason.

    `elapsed` is the time from the run's start to the round's end. Where cohorts are secret, the counts are
    left out.
    """

    seconds: float
    elapsed: float
    unavailable: NotRequired[int]
    late: NotRequired[int]
    surplus: NotRequired[int]


class LayerError(TypedDict):
    """How far a merged adapter of one layer is from the mean of the clients' products, in Frobenius norm."""

    frobenius: float
    relative: float


class AggregationError(TypedDict):
    """The error of a merge over all layers, and of each layer."""

    frobenius: float
    layers: dict[str, LayerError]


class Staleness(TypedDict):
    """How many merges late a round's updates were."""

    mean: float
    max: int


class RoundExtras(TypedDict, total=False):
    """The keys of a round's line that only some runs have."""

    seconds: float
    seconds_at_clients: float
    simulated: SimulatedRound
    validation: MetricValues
    """MetricValues over all clients' validation splits, for early stopping."""
    contributions: dict[str, float | None]
    """What each client's update added to the primary metric."""
    tuning: str
    """What is trained, where that changes during the run."""
    aggregation_error: AggregationError
    staleness: Staleness
    assigned_steps: dict[str, int]
    """How many local steps the server gave each client."""
    clusters: list[list[str]]
    """Which clients chose each cluster's model."""
    charged_rounds: int
    """The largest number of the run's rounds in any client's ledger."""


class RoundLine(RoundExtras):
    """One round: a line of `metrics.jsonl`.

    Bytes are totals since the run's start. `set_aside` has the reason for each client whose update was not
    merged. `loss` is the clients' mean training loss; None under privacy.
    """

    round: int
    cohort: list[str]
    loss: float | None
    metrics: MetricValues
    trained: int
    bytes_up: int
    bytes_down: int
    set_aside: dict[str, str]
    model_sha256: str


class PublicFields(TypedDict):
    """The values that replace a line's fields about participants, where participation is secret."""

    cohort: list[str]
    trained: int
    set_aside: dict[str, str]
    bytes_up: int
    bytes_down: int
    simulated: NotRequired[SimulatedRound]


class FinalMetrics(TypedDict):
    """The final model on the server's test set (empty without one) and at each client that measured it.

    A client's metrics have `examples` too, the number that it measured on.
    """

    server: MetricValues
    clients: dict[str, MetricValues]


class SumsOfFeatures(TypedDict):
    """How a closed form's sums were bounded: the norm of an example's features, and the sums' sensitivity."""

    feature_norm: float
    sensitivity: float


class Spent(TypedDict):
    """Epsilon at a delta; None where epsilon is infinite."""

    epsilon: float | None
    delta: float


class ClaimExtras(TypedDict, total=False):
    """The keys that only some claims have."""

    epsilon_rdp: float | None
    relation: str
    sampler: str
    releases: int
    clipping: str
    divisor: float
    target_epsilon: float | None
    bands: int
    """For banded noise: all releases together cost as one of this `sensitivity`, in clipping norms."""
    sensitivity: float
    sums_of_features: SumsOfFeatures
    last_clipping_norm: float | None
    epsilon_of_all_runs: float | None
    """Epsilon of all runs that were charged to the same ledger."""
    without_teacher: Spent
    teacher: Spent
    audit: dict[str, Any]
    """The results of an attack on the whole run (`atoll.report.audit` describes them)."""


class PrivacyClaim(ClaimExtras):
    """The guarantee for one unit (client or example), and its assumptions; epsilon is None if infinite."""

    unit: str
    epsilon: float | None
    delta: float
    accountant: str
    noise_multiplier: float
    clipping_norm: float
    where: str
    seeded_noise: bool


class RunPrivacy(ClaimExtras):
    """The claim with the larger epsilon, and each unit's in `units`; all None in a run without a promise."""

    unit: str
    epsilon: float | None
    delta: float | None
    accountant: str | None
    noise_multiplier: float | None
    clipping_norm: float | None
    where: str | None
    seeded_noise: bool | None
    units: dict[str, PrivacyClaim]
    ended_early: NotRequired[str | None]


Personal = TypedDict(
    "Personal",
    {
        "keep": str,
        "clients": MetricValues,
        "global": NotRequired[MetricValues],
        "global_clients": NotRequired[dict[str, MetricValues]],
    },
)
"""What clients keep of their models, the means of their metrics, and the shared model's metrics at them.

It is written as a call since `global` is a keyword of Python.
"""


class Compression(TypedDict):
    """The compression of updates, and how many times smaller they are than their tensors."""

    scheme: str
    times_smaller: float


class BackboneUsed(TypedDict):
    """The backbone's name in the job, and where its weights came from."""

    name: str
    origin: str


class ClientContribution(TypedDict):
    """A client's summed contribution over the rounds in which it sent an update; None if none is defined."""

    value: float | None
    rounds: int
    undefined: int


class Contributions(TypedDict):
    """What each client's updates added to a metric on the server's test set."""

    method: str
    metric: str
    lower_is_better: bool
    clients: dict[str, ClientContribution]


class Sample(TypedDict):
    """A held-out prompt, what the model wrote for it before and after training, and the data's own text."""

    prompt: str
    before: str
    after: str
    reference: str


class Plugin(TypedDict):
    """A Python file that brought what the job names."""

    file: str
    sha256: str


class Forgotten(TypedDict):
    """A client whose sums were taken out of the model after the run, and which model replaced which."""

    client: str
    replaced_sha256: str
    model_sha256: str
    clients_left: int
    time: str


@dataclass(frozen=True)
class RunResult:
    """The result of a complete run, with a field for each key of `result.json`.

    `seconds` is the run's time on this machine, `simulated_seconds` that of simulated devices, None without
    them. Bytes are totals of all rounds. `data` says how much of the data was used, or None where that is
    private; `facts` has what the clients agreed on, such as classes. `trainable` has the shape of each
    trained tensor by name. Fields with a default are written only where they have a value.

    >>> RunResult.from_json({}, origin="runs/x/result.json")
    Traceback (most recent call last):
    ...
    atoll.errors.ConfigError: runs/x/result.json: name: missing, expected a result as Atoll 0.1.0 writes it
    """

    name: str
    job_hash: str
    model_sha256: str
    engine: str
    task: str
    strategy: str
    seed: int
    seconds: float
    simulated_seconds: float | None
    population: int
    data: dict[str, Any] | None
    clients_trained: int
    bytes_up: int
    bytes_down: int
    peak_rss_mb: float
    rounds: list[RoundLine]
    final: FinalMetrics
    personal: Personal | None
    baselines: dict[str, MetricValues]
    privacy: RunPrivacy
    compression: Compression | None
    facts: dict[str, Any]
    backbone: BackboneUsed
    trainable: dict[str, list[int]]
    machine: dict[str, Any]
    notes: list[str]
    contributions: Contributions | None = None
    samples: list[Sample] | None = None
    plugins: list[Plugin] | None = None
    forgotten: list[Forgotten] | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; its nested tables are shared with this result, not copied."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None or key in REQUIRED}

    @classmethod
    def from_json(cls, table: object, *, origin: str) -> Self:
        """The result from the JSON object of a file.

        Raises:
            ConfigError: a key is missing, unknown or of another type; the line begins with `origin`.
        """
        written = f"expected a result as Atoll {version('atoll')} writes it"
        if not isinstance(table, dict):
            raise ConfigError(f"{origin}: {written}, found no table")
        for key in KEYS:
            if key in REQUIRED and key not in table:
                raise ConfigError(f"{origin}: {key}: missing, {written}")
        for key in table:
            if key not in KEYS:
                raise ConfigError(f"{origin}: {key}: unknown key, {written}")
        try:
            _checked().validate_json(json.dumps(table), strict=True)
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            key = ".".join(map(str, finding["loc"]))
            raise ConfigError(f"{origin}: {key}: {finding['msg']}; {written}") from None
        return cls(**table)

    @classmethod
    def read(cls, run: Path) -> Self:
        """The result of a run directory.

        Raises:
            ConfigError: there is no result.json, or it isn't a valid result; the line names the file.
        """
        path = run / RESULT_FILE
        try:
            table = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        return cls.from_json(table, origin=str(path))

    @classmethod
    def of_job(cls, run: Path, job_hash: str) -> Self | None:
        """The result in a run directory, or None where there is none or it is another job's."""
        try:
            result = cls.read(run)
        except ConfigError:
            return None
        return result if result.job_hash == job_hash else None

    def write(self, run: Path) -> None:
        """Write `result.json` atomically; its presence marks the run as complete.

        Raises:
            JobError: the disk is full or fails.
        """
        path = run / RESULT_FILE
        try:
            replace_synced(path, json.dumps(self.to_json(), indent=2, allow_nan=False).encode())
        except OSError as error:
            raise JobError(f"{path}: not written ({error.strerror})") from None


KEYS = tuple(field.name for field in fields(RunResult))
REQUIRED = frozenset(field.name for field in fields(RunResult) if field.default is MISSING)


@cache
def _checked() -> TypeAdapter[RunResult]:
    return TypeAdapter(RunResult)
