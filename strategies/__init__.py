"""How updates merge into the next global model: pure functions on tensors.

The registry can be read without importing torch; a strategy's module is imported when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from atoll.errors import ConfigError
from atoll.job.extension_options import checked_options, validated
from atoll.job.federation import FederationSection
from atoll.job.job import Job, StrategySection
from atoll.job.train import TrainSection
from atoll.plugins import BUILT_IN, Extension, Registry
from atoll.strategies.options import (
    HOSTILE_OPTIONS,
    AflOptions,
    FedCompassOptions,
    FedDynOptions,
    FedExpOptions,
    FlandersOptions,
    FlTrustOptions,
    HostileClients,
    HostileOptions,
    IfcaOptions,
    LateOptions,
    MoonOptions,
    PerFedAvgOptions,
    PFedMeOptions,
    QFedAvgOptions,
    ScaffoldOptions,
    check_hostile_clients,
    check_trusted_client,
)

if TYPE_CHECKING:
    from atoll.protocol.messages import Update
    from atoll.protocol.tensors import Tensors
    from atoll.strategies.mean import moved, weighted_mean
    from atoll.strategies.strategy import Plan, State, Strategy

__all__ = [
    "STRATEGIES", "Entry", "Plan", "State", "Strategy", "Tensors", "Update",
    "build_strategy", "check_strategy", "moved", "weighted_mean",
]  # fmt: skip

_ELSEWHERE = {
    "Plan": "atoll.strategies.strategy",
    "State": "atoll.strategies.strategy",
    "Strategy": "atoll.strategies.strategy",
    "Tensors": "atoll.protocol.tensors",
    "Update": "atoll.protocol.messages",
    "moved": "atoll.strategies.mean",
    "weighted_mean": "atoll.strategies.mean",
}
"""Names for writing a strategy, and their modules, which import torch and are therefore loaded on access."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'atoll.strategies' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


SCHEDULE_KEYS = ("lr_schedule", "lr_warmup", "lr_step", "lr_decay")
"""Keys of every strategy that has an `lr`."""


@dataclass(frozen=True)
class Entry:
    """One line of the registry: how a strategy is built, its keys in `[strategy]`, its summary and origin.

    `options` is the pydantic model of its `strategy.options`, if it has any. With `counts_clients` it is
    built with the number of all clients, with `counts_at_work` with that of clients at work at a time, with
    `knows_client_lr` with the clients' learning rate, with `knows_seed` with the job's seed.
    """

    build: Callable[..., Strategy]
    keys: tuple[str, ...]
    summary: str
    origin: str = BUILT_IN
    options: type[BaseModel] | None = None
    counts_clients: bool = False
    counts_at_work: bool = False
    knows_client_lr: bool = False
    knows_seed: bool = False

    @property
    def accepted_keys(self) -> tuple[str, ...]:
        """`keys`, and those of a learning-rate schedule if the strategy has a learning rate."""
        return (*self.keys, *SCHEDULE_KEYS) if "lr" in self.keys else self.keys


def _fedavg(**keys: float) -> Strategy:
    from atoll.strategies.fedavg import FedAvg

    return FedAvg(**keys)


def _fedopt(step: str, **keys: float) -> Strategy:
    from atoll.strategies import fedopt

    return fedopt.FedOpt(fedopt.STEPS[step], **keys)


def _reptile(**keys: float) -> Strategy:
    from atoll.strategies.meta.reptile import Reptile

    return Reptile(**keys)


def _diloco(**keys: float) -> Strategy:
    from atoll.strategies.diloco import DiLoCo

    return DiLoCo(**keys)


def _fednova(**keys: float) -> Strategy:
    from atoll.strategies.fednova import FedNova

    return FedNova(**keys)


def _fedexp(options: FedExpOptions) -> Strategy:
    from atoll.strategies.fedexp import FedExp

    return FedExp(options.epsilon)


def _signsgd(**keys: float) -> Strategy:
    from atoll.strategies.few_bytes.signsgd import SignSgd

    return SignSgd(**keys)


def _scaffold(options: ScaffoldOptions, **keys: Any) -> Strategy:
    from atoll.strategies.scaffold import Scaffold

    return Scaffold(**keys)


def _feddyn(options: FedDynOptions, clients: int) -> Strategy:
    from atoll.strategies.feddyn import FedDyn

    return FedDyn(clients, options.alpha)


def _qffl(options: QFedAvgOptions, client_lr: float) -> Strategy:
    from atoll.strategies.fair.qffl import QFedAvg

    return QFedAvg(options.lipschitz or 1 / client_lr, options.q)


def _afl(options: AflOptions, **keys: Any) -> Strategy:
    from atoll.strategies.fair.afl import AgnosticFederatedLearning

    return AgnosticFederatedLearning(lambda_lr=options.lambda_lr, **keys)


def _per_fedavg(options: PerFedAvgOptions, **keys: float) -> Strategy:
    from atoll.strategies.meta.per_fedavg import PerFedAvg

    return PerFedAvg(**keys)


def _moon(options: MoonOptions, **keys: float) -> Strategy:
    from atoll.strategies.unlike_shards.moon import Moon

    return Moon(**keys)


def _pfedme(options: PFedMeOptions, **keys: float) -> Strategy:
    from atoll.strategies.personal.pfedme import PFedMe

    return PFedMe(**keys)


def _ifca(options: IfcaOptions) -> Strategy:
    from atoll.strategies.personal.ifca import Ifca

    return Ifca()


def _fedbuff(options: LateOptions, **keys: Any) -> Strategy:
    from atoll.strategies.asynchronous.fedbuff import FedBuff

    return FedBuff(**keys, **options.model_dump())


def _fedasync(options: LateOptions, **keys: Any) -> Strategy:
    from atoll.strategies.asynchronous.fedasync import FedAsync

    return FedAsync(**keys, **options.model_dump())


def _fedcompass(options: FedCompassOptions, **keys: Any) -> Strategy:
    from atoll.strategies.asynchronous.fedcompass import FedCompass

    weights = {name: getattr(options, name) for name in LateOptions.model_fields}
    return FedCompass(**keys, **weights)


def _robust(name: str, options: HostileOptions, **keys: float) -> Strategy:
    from atoll.strategies.robust.merge import robust_strategy

    return robust_strategy(name, options, **keys)


def _flanders(options: FlandersOptions, **keys: Any) -> Strategy:
    from atoll.strategies.robust.flanders import Flanders

    return Flanders(options, **keys)


def _fltrust(options: FlTrustOptions, **keys: float) -> Strategy:
    from atoll.strategies.robust.fltrust import FlTrust

    return FlTrust(options.root, **keys)


def _against_hostile(name: str, summary: str) -> Entry:
    return Entry(partial(_robust, name), ("lr", "options"), summary, options=HOSTILE_OPTIONS[name])


ALONE = FederationSection()
"""A `[federation]` with every default."""

TRAINING = TrainSection()
"""A `[train]` with every default."""

ADAPTIVE = ("lr", "beta1", "beta2", "tau")

BUILT_INS: dict[str, Entry] = {
    "fedavg": Entry(_fedavg, ("lr",), "mean of the deltas, weighted by examples (McMahan 2017)"),
    "fedavgm": Entry(
        partial(_fedavg, momentum=0.9), ("lr", "momentum"), "FedAvg with server momentum (Hsu 2019)"
    ),
    "fedprox": Entry(
        partial(_fedavg, proximal_mu=0.01),
        ("lr", "proximal_mu"),
        "FedAvg whose clients are held near the global model (Li 2020)",
    ),
    "fedadagrad": Entry(
        partial(_fedopt, "adagrad", beta1=0.0), ADAPTIVE, "Adagrad on the mean delta (Reddi 2021)"
    ),
    "fedadam": Entry(partial(_fedopt, "adam"), ADAPTIVE, "Adam on the mean delta (Reddi 2021)"),
    "fedyogi": Entry(partial(_fedopt, "yogi"), ADAPTIVE, "Yogi on the mean delta (Reddi 2021)"),
    "diloco": Entry(_diloco, ("lr", "momentum"), "Nesterov's momentum on the mean delta (Douillard 2023)"),
    "reptile": Entry(_reptile, ("lr",), "part of the way to the clients' even mean (Nichol 2018)"),
    "fednova": Entry(
        _fednova, ("lr",), "mean of the deltas per local step, times the mean steps (Wang 2020)"
    ),
    "fedexp": Entry(
        _fedexp,
        ("options",),
        "mean delta, in a step as long as the deltas disagree (Jhunjhunwala 2023)",
        options=FedExpOptions,
    ),
    "signsgd": Entry(
        _signsgd, ("lr",), "a step of one length to where most deltas point, a bit a number (Bernstein 2018)"
    ),
    "scaffold": Entry(
        _scaffold,
        ("lr", "options"),
        "even mean of deltas whose local steps are corrected for the clients' drift (Karimireddy 2020)",
        options=ScaffoldOptions,
        counts_clients=True,
    ),
    "feddyn": Entry(
        _feddyn,
        ("options",),
        "even mean of models that a changing penalty leads to the same minimum (Acar 2021)",
        options=FedDynOptions,
        counts_clients=True,
    ),
    "moon": Entry(
        _moon,
        ("lr", "options"),
        "FedAvg of networks whose representations are held near the global model's (Li 2021)",
        options=MoonOptions,
    ),
    "per-fedavg": Entry(
        _per_fedavg,
        ("lr", "options"),
        "even mean of deltas made for a model that a step adapts, first-order MAML (Fallah 2020)",
        options=PerFedAvgOptions,
    ),
    "pfedme": Entry(
        _pfedme,
        ("lr", "options"),
        "even mean of models that clients' own ones are held to, by Moreau envelopes (T. Dinh 2020)",
        options=PFedMeOptions,
    ),
    "ifca": Entry(
        _ifca,
        ("options",),
        "a model for each cluster of clients, who take the one that fits them best (Ghosh 2020)",
        options=IfcaOptions,
    ),
    "qffl": Entry(
        _qffl,
        ("options",),
        "deltas weighted by a power of each client's loss, q-FedAvg (Li 2020)",
        options=QFedAvgOptions,
        knows_client_lr=True,
    ),
    "afl": Entry(
        _afl,
        ("lr", "options"),
        "deltas weighted for the worst mixture of the clients' data (Mohri 2019)",
        options=AflOptions,
        counts_clients=True,
    ),
    "fedbuff": Entry(
        _fedbuff,
        ("lr", "momentum", "options"),
        "even mean of the updates that come first, each weighed by how late it is (Nguyen 2022)",
        options=LateOptions,
    ),
    "fedasync": Entry(
        _fedasync,
        ("lr", "proximal_mu", "options"),
        "part of the way to every client's model as it comes, less to a late one (Xie 2019)",
        options=LateOptions,
    ),
    "fedcompass": Entry(
        _fedcompass,
        ("lr", "options"),
        "deltas of groups whose steps let them be done together, less of a late one (Li 2024)",
        options=FedCompassOptions,
        counts_at_work=True,
    ),
    **{
        name: _against_hostile(name, summary)
        for name, summary in {
            "coordinate-median": "median of every number, against hostile clients (Yin 2018)",
            "trimmed-mean": "mean of every number without the extremes, against hostile clients (Yin 2018)",
            "geometric-median": "the point nearest to all deltas, against hostile clients (Pillutla 2022)",
            "krum": "the delta whose neighbours are nearest, against hostile clients (Blanchard 2017)",
            "multi-krum": "mean of the deltas that Krum rates best, against hostile clients (Blanchard 2017)",
            "bulyan": "trimmed mean of what Krum chooses, against hostile clients (El Mhamdi 2018)",
            "centered-clipping": "deltas clipped around the last, against hostile clients (Karimireddy 2021)",
            "norm-bound": "even mean of clipped deltas, against hostile clients (Sun 2019)",
        }.items()
    },
    "flanders": Entry(
        _flanders,
        ("lr", "options"),
        "deltas that clients' own past leads to, against hostile clients (Gabrielli 2023)",
        options=FlandersOptions,
        knows_seed=True,
    ),
    "fltrust": Entry(
        _fltrust,
        ("lr", "options"),
        "deltas that point where a trusted client's points, against hostile clients (Cao 2021)",
        options=FlTrustOptions,
    ),
}


def _brought(extension: Extension, options: Mapping[str, Any] | None = None) -> Strategy:
    extension = extension.loaded()
    assert extension.thing is not None
    strategy: Strategy = extension.thing(*checked_options(extension, options, "strategy.options"))
    for method in ("begin", "plan", "merge"):
        if not callable(getattr(strategy, method, None)):
            raise ConfigError(
                f"strategy.name: {extension.name} ({extension.origin}) has no method {method},"
                " expected begin, plan and merge"
            )
    return strategy


def _of(extension: Extension) -> Entry:
    return Entry(partial(_brought, extension), ("options",), extension.summary, extension.origin)


STRATEGIES = Registry("strategy", BUILT_INS, _of)


def check_strategy(section: StrategySection) -> None:
    """Check a strategy's name and, for Atoll's own, its keys and options, without importing torch.

    Raises:
        ConfigError: the name or a key is unknown, or an option is unknown or out of bounds.
    """
    if section.name.startswith("flwr:"):
        from atoll.strategies.flower_names import check_flower_name

        check_flower_name(section.name.removeprefix("flwr:"))
        return
    STRATEGIES.check(section.name, "strategy.name", " (or flwr:NAME)")
    entry = STRATEGIES[section.name]
    for key in _given_keys(section):
        if key not in entry.accepted_keys:
            known = ", ".join(entry.accepted_keys)
            raise ConfigError(f"strategy.{key}: {section.name} does not use it, expected only {known}")
    _options(entry, section)


def check_merging(job: Job) -> None:
    """Check whether the job's rounds have what its strategy needs, without importing torch.

    Raises:
        ConfigError: as `check_strategy`, or the rounds lack something, such as enough clients.
    """
    check_strategy(job.strategy)
    if (job.strategy.lr_warmup or 0) >= job.federation.rounds:
        raise ConfigError(
            f"strategy.lr_warmup: expected less than federation.rounds = {job.federation.rounds}, found"
            f" {job.strategy.lr_warmup}"
        )
    if job.strategy.name == "fednova" and "example" in job.privacy.units:
        raise ConfigError(
            "strategy.name: under example-level privacy all clients take as many steps, and fednova"
            " is fedavg; expected 'fedavg', found 'fednova'"
        )
    if job.strategy.name in HOSTILE_OPTIONS:
        options = _options(STRATEGIES[job.strategy.name], job.strategy)
        assert isinstance(options, HostileClients)
        check_hostile_clients(job, options)
    check_trusted_client(job)


def _options(entry: Entry, section: StrategySection) -> BaseModel | None:
    """The validated options of one of Atoll's own strategies."""
    if entry.options is None:
        return None
    return validated(entry.options, section.options or {}, "strategy.options")


def build_strategy(
    section: StrategySection,
    federation: FederationSection = ALONE,
    train: TrainSection = TRAINING,
    seed: int = 0,
) -> Strategy:
    """The strategy that a job's `[strategy]` names; `flwr:NAME` is one of Flower's.

    `federation` gives some strategies the number of clients, `train` the clients' learning rate, and `seed`
    is the job's, from which some draw.

    Raises:
        ConfigError: the name or a key is unknown, or an option is out of bounds.
    """
    check_strategy(section)
    if section.name.startswith("flwr:"):
        from atoll.strategies.flower import FlowerStrategy

        return FlowerStrategy.named(section.name.removeprefix("flwr:"), _given_keys(section))
    entry = STRATEGIES[section.name]
    keys = {key: value for key, value in _given_keys(section).items() if key not in SCHEDULE_KEYS}
    options = _options(entry, section)
    if options is not None:
        keys["options"] = options
    if entry.counts_clients:
        keys["clients"] = federation.clients
    if entry.counts_at_work:
        keys["at_work"] = federation.concurrency or federation.clients
    if entry.knows_client_lr:
        keys["client_lr"] = train.lr
    if entry.knows_seed:
        keys["seed"] = seed
    return _scheduled(entry.build(**keys), section, federation)


def _scheduled(strategy: Strategy, section: StrategySection, federation: FederationSection) -> Strategy:
    if section.lr_schedule is None:
        return strategy
    from atoll.strategies.lr_schedule import LrSchedule, Scheduled

    return Scheduled(strategy, LrSchedule(section, federation.rounds))


def _given_keys(section: StrategySection) -> dict[str, Any]:
    return {k: v for k, v in section.model_dump().items() if k != "name" and v is not None}
