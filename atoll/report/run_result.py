"""What a complete run holds: `result.json` as an object, and the tables in it.

`RunResult` has a field for each key of the file. What is nested stays a JSON object with the keys that its
type lists, so that a line of `metrics.jsonl` and the same line in a result are one value.
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

RESULT_FILE = "result.json"

Metrics = dict[str, float | None]
"""Metrics by name; None where one is undefined. A client's have `examples` too, what it measured on."""


class SimulatedRound(TypedDict):
    """A round by the devices' own clock: seconds, and how many clients were asked in vain and why.

    `elapsed` are the seconds from the run's beginning to the round's end. Where a cohort is secret, no
    counts are there.
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
    """The same over all layers, and of each."""

    frobenius: float
    layers: dict[str, LayerError]


class Staleness(TypedDict):
    """How many merges late a round's updates were."""

    mean: float
    max: int


class RoundExtras(TypedDict, total=False):
    """What only some runs have in a round's line."""

    seconds: float
    seconds_at_clients: float
    simulated: SimulatedRound
    validation: Metrics
    """What clients measured for early stopping."""
    contributions: dict[str, float | None]
    """What each client's update added to the headline metric."""
    tuning: str
    """What is tuned, where that changes during the run."""
    aggregation_error: AggregationError
    staleness: Staleness
    clusters: list[list[str]]
    """Which clients chose each cluster's model."""
    charged_rounds: int
    """The most rounds that any client's ledger holds of the run."""


class RoundLine(RoundExtras):
    """A round, as `metrics.jsonl` has it: one line a round.

    Bytes are those since the run's beginning. `set_aside` has the reason for each client whose update was
    not merged. `loss` is the clients' mean training loss, None under privacy.
    """

    round: int
    cohort: list[str]
    loss: float | None
    metrics: Metrics
    trained: int
    bytes_up: int
    bytes_down: int
    set_aside: dict[str, str]
    model_sha256: str


class PublicFields(TypedDict):
    """What stands in a line in place of who took part, where that is secret."""

    cohort: list[str]
    trained: int
    set_aside: dict[str, str]
    bytes_up: int
    bytes_down: int
    simulated: NotRequired[SimulatedRound]


class FinalMetrics(TypedDict):
    """The final model on the server's test set (empty without one) and at each client that measured it."""

    server: Metrics
    clients: dict[str, Metrics]


class SumsOfFeatures(TypedDict):
    """How a closed form's sums were bounded: the norm of one example's features, and what it moves."""

    feature_norm: float
    sensitivity: float


class Spent(TypedDict):
    """Epsilon at a delta; None where no finite number stands for it."""

    epsilon: float | None
    delta: float


class ClaimExtras(TypedDict, total=False):
    """What only some claims have."""

    epsilon_rdp: float | None
    relation: str
    sampler: str
    releases: int
    clipping: str
    divisor: float
    target_epsilon: float | None
    bands: int
    """Of correlated noise, with `sensitivity`: the releases cost as one of that sensitivity, in norms."""
    sensitivity: float
    sums_of_features: SumsOfFeatures
    last_clipping_norm: float | None
    epsilon_of_all_runs: float | None
    """What all runs that were charged to the same ledger have spent."""
    without_teacher: Spent
    teacher: Spent
    audit: dict[str, Any]
    """Of a whole run: what an attack on it found (`atoll.report.audit` says it in words)."""


class PrivacyClaim(ClaimExtras):
    """What is promised to one unit, and what that rests on; epsilon is None where no number stands for it."""

    unit: str
    epsilon: float | None
    delta: float
    accountant: str
    noise_multiplier: float
    clipping_norm: float
    where: str
    seeded_noise: bool


class RunPrivacy(ClaimExtras):
    """The claim with the larger epsilon, and those of all units; of a run without a promise all is None."""

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
        "clients": Metrics,
        "global": NotRequired[Metrics],
        "global_clients": NotRequired[dict[str, Metrics]],
    },
)
"""What clients keep of their models, means of their metrics, and what the shared model measures at them.

Written as a call, for `global` is a word of Python.
"""


class Compression(TypedDict):
    """How updates travelled, and how many times smaller than the tensors they stand for."""

    scheme: str
    times_smaller: float


class BackboneUsed(TypedDict):
    """The backbone's name in the job, and where its weights came from."""

    name: str
    origin: str


class ClientContribution(TypedDict):
    """A client's sum over the rounds in which it sent an update; None where no round has a value."""

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
    """A complete run: what `result.json` holds, key by key.

    `seconds` are this machine's, `simulated_seconds` the devices' own where they are simulated, and bytes
    those of all rounds. `data` says how much of the data was used, None where that isn't told; `facts` what
    the task knows of it, such as classes. `trainable` has the shape of each tensor that was trained.
    Fields with a default are keys that are written only where there is something.

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
    baselines: dict[str, Metrics]
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
        """The object that `result.json` holds; its tables are this result's own, not copies."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None or key in REQUIRED}

    @classmethod
    def from_json(cls, table: object, *, origin: str) -> Self:
        """The result that a file holds.

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
            ConfigError: there is no result.json, or it is none; the line names the file.
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
        """The result in a run directory if it is one of this very job, else None: there is work to do."""
        try:
            found = cls.read(run)
        except ConfigError:
            return None
        return found if found.job_hash == job_hash else None

    def write(self, run: Path) -> None:
        """Write `result.json`, whole or not at all; its presence says that the run is complete.

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
