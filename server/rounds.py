"""The rounds of a run: sample, send, train, check, merge, evaluate, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from protocol.cohort import StackedUpdates, stacked_states
from protocol.errors import ConfigError, InconsistentUpdates
from protocol.job import Job
from protocol.messages import Failure, Hello, Measurement, Reply, Request
from protocol.streams import stream
from protocol.tensors import Tensors, tensors_sha256
from server.carrier import Carrier
from server.checkpoint import Checkpoint
from server.rundir import RunDirectory
from server.screen import Screened, screen, screen_stack
from strategies import State, Strategy, build_strategy
from tasks import task_named
from tasks.learner import Learner, added
from tasks.seam import Shard

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times a round below its quorum is tried before the run fails."""

Watch = Callable[[str, dict[str, Any]], None]
"""Told of every step: a name (`hello`, `round`, …) and what there is to show."""

TestSet = Callable[[Learner], Shard | None]
"""The server's own test set, once the run's facts are known."""


@dataclass
class Run:
    """One run in progress: what is fixed for all of its rounds, and where it has got to."""

    job: Job
    carrier: Carrier
    directory: RunDirectory
    learner: Learner
    strategy: Strategy
    population: tuple[str, ...]
    tensors: Tensors
    state: State
    test: Shard | None
    watch: Watch
    round: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    first_model: Tensors = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


def open_run(
    job: Job, carrier: Carrier, directory: RunDirectory, test_set: TestSet, watch: Watch, *, resume: bool
) -> Run:
    """Greet the clients, agree on the facts, and start at round 0 or at the last checkpoint.

    Raises:
        ConfigError, WeightsError, DataError: the job cannot run here, or with these clients.
    """
    strategy = build_strategy(job.strategy)
    hellos = _accepted(carrier.hello(job), job)
    task = task_named(job.task.name)
    learner = Learner.of(job, task, task.agree([h.facts for h in hellos]))
    learner.facts = learner.facts | {"backbone": learner.backbone.fingerprint}
    torch.set_num_threads(job.train.threads)
    first = learner.initial()
    population = tuple(sorted(h.client for h in hellos))
    watch("hello", {"hellos": hellos, "backbone": learner.backbone, "facts": learner.facts})
    run = Run(
        job, carrier, directory, learner, strategy, population, dict(first), strategy.begin(first),
        test_set(learner), watch, first_model=first,
    )  # fmt: skip
    found = directory.latest_checkpoint(job.hash) if resume else None
    if found is not None:
        _continue_from(run, found)
    return run


def _accepted(hellos: Sequence[Hello], job: Job) -> list[Hello]:
    accepted = [h for h in hellos if not h.refusal]
    needed = job.federation.cohort or 1
    if len(accepted) < needed:
        raise ConfigError(
            f"{len(accepted)} of {len(hellos)} clients take part, a round needs {needed}{_reasons(hellos)}"
        )
    for hello in hellos:
        if hello.refusal:
            logger.warning("%s does not take part: %s", hello.client, hello.refusal)
    return accepted


def _reasons(hellos: Sequence[Hello]) -> str:
    """Why clients don't take part: each of a few reasons once, with the first client that gave it."""
    first: dict[str, str] = {}
    for hello in hellos:
        if hello.refusal:
            first.setdefault(hello.refusal, hello.client)
    told = [f"{client}: {refusal}" for refusal, client in list(first.items())[:3]]
    more = [f"and {len(first) - 3} other reasons"] if len(first) > 3 else []
    return f" ({'; '.join(told + more)})" if told else ""


def _continue_from(run: Run, found: Checkpoint) -> None:
    if found.facts != run.learner.facts:
        changed = sorted(
            k for k in {*found.facts, *run.learner.facts} if found.facts.get(k) != run.learner.facts.get(k)
        )
        raise ConfigError(f"cannot resume: changed since the checkpoint: {', '.join(changed)}")
    run.round, run.tensors, run.state = found.round, found.tensors, found.state
    run.bytes_up, run.bytes_down = found.bytes_up, found.bytes_down
    run.log = run.directory.wind_back(found.round)
    run.watch("resumed", {"round": run.round})


def all_rounds(run: Run) -> None:
    """Play the rounds that are left."""
    while run.round < run.job.federation.rounds:
        play_round(run)


def play_round(run: Run) -> None:
    """One round, from sampling to the checkpoint."""
    started = time.monotonic()
    round = run.round + 1
    cohort = sample(run.population, run.job, round)
    screened = train(run, cohort, round)
    at_clients = time.monotonic() - started
    if screened.updates:
        run.tensors, run.state = run.strategy.merge(run.tensors, screened.updates, run.state)
    run.round = round
    metrics = measure(run) if round % run.job.evaluate.every == 0 else {}
    seconds = {"seconds": time.monotonic() - started, "seconds_at_clients": at_clients}
    line = _log_line(run, cohort, screened, metrics, seconds)
    run.log.append(line)
    run.directory.append_metrics(line)
    checkpoint(run)
    run.watch("round", line)


def sample(population: Sequence[str], job: Job, round: int) -> list[str]:
    """The round's cohort, sorted: a fixed number without replacement, or each client by a coin."""
    generator = stream(job.seed, "cohort", round)
    rate, count = job.federation.cohort_rate, job.federation.cohort
    if rate is not None:
        coins = torch.rand(len(population), generator=generator, dtype=torch.float64)
        chosen = (coins < rate).nonzero().flatten()
    elif count is None or count >= len(population):
        return list(population)
    else:
        chosen = torch.randperm(len(population), generator=generator)[:count]
    return [population[i] for i in sorted(chosen.tolist())]


def train(run: Run, cohort: Sequence[str], round: int) -> Screened:
    """Send the model to the cohort and collect usable updates.

    Raises:
        InconsistentUpdates: fewer than the quorum came back, several times over.
    """
    needed = max(1, round_up(run.job.federation.quorum * len(cohort)))
    for attempt in range(1, ATTEMPTS + 1):
        plan = run.strategy.plan(run.state, round)
        request = _request(run, "train", round, plan)
        replies = run.carrier.exchange(request, cohort, run.job.federation.round_timeout)
        screened = look_at(replies, cohort, run.tensors, round)
        run.bytes_down += len(cohort) * size_of(run.tensors)
        run.bytes_up += len(screened.updates) * size_of(run.tensors)
        for name, reason in screened.set_aside.items():
            logger.warning("round %d: set aside %s: %s", round, name, reason)
        if len(screened.updates) >= needed or not cohort:
            return screened
        logger.warning(
            "round %d abandoned: %d of %d usable updates, needed %d (attempt %d of %d)",
            round, len(screened.updates), len(cohort), needed, attempt, ATTEMPTS,
        )  # fmt: skip
    reasons = "; ".join(f"{name}: {why}" for name, why in list(screened.set_aside.items())[:3])
    raise InconsistentUpdates(
        f"round {round}: {len(screened.updates)} of {len(cohort)} usable updates,"
        f" needed {needed} ({reasons})"
        + ("; go on after the last whole round with --resume" if run.round else "")
    )


def look_at(replies: Iterable[Reply], cohort: Sequence[str], model: Tensors, round: int) -> Screened:
    """Screen the replies, stacked ones all at once."""
    if isinstance(replies, StackedUpdates):
        return screen_stack(replies, cohort, model, round)
    return screen(replies, cohort, model, round)


def size_of(tensors: Tensors) -> int:
    """Bytes of the tensors' values."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def round_up(value: float) -> int:
    """The smallest integer that is not below, forgiving the last bits of a float."""
    return int(-(-(value - 1e-9) // 1))


def measure(run: Run) -> dict[str, float]:
    """Metrics of the global model: on the server's test set, or, without one, over all clients."""
    if run.test is not None:
        return run.learner.compute(run.learner.evaluate(run.tensors, run.test))
    measurements = measure_clients(run)
    states = [m.states for m in measurements if m.num_examples]
    return run.learner.compute(added(states)) if states else {}


def measure_clients(run: Run) -> list[Measurement]:
    """The global model on every client's validation split, by client name."""
    request = _request(run, "evaluate", run.round, {})
    replies = run.carrier.exchange(request, run.population, run.job.federation.round_timeout)
    run.bytes_down += len(run.population) * size_of(run.tensors)
    measurements = []
    for reply in replies:
        match reply:
            case Measurement() if reply.client in run.population:
                measurements.append(reply)
            case Failure():
                logger.warning("evaluation: set aside %s: %s", reply.client, reply.reason)
    return sorted(measurements, key=lambda m: m.client)


def checkpoint(run: Run) -> None:
    """Make the round durable: a run killed from here on resumes after it."""
    run.directory.save_checkpoint(
        Checkpoint(
            round=run.round,
            job_hash=run.job.hash,
            tensors=run.tensors,
            state=run.state,
            bytes_up=run.bytes_up,
            bytes_down=run.bytes_down,
            facts=run.learner.facts,
        )
    )


def _request(run: Run, kind: str, round: int, plan: Any) -> Request:
    return Request(
        kind=kind,
        job=run.job.canonical,
        job_hash=run.job.hash,
        round=round,
        facts=run.learner.facts,
        tensors=run.tensors,
        plan=dict(plan),
    )


def _log_line(
    run: Run,
    cohort: Sequence[str],
    screened: Screened,
    metrics: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    states = stacked_states(screened.updates) if screened.updates else {}
    count = float(states["train_loss.count"].sum()) if states else 0.0
    return {
        "round": run.round,
        "cohort": list(cohort),
        "loss": float(states["train_loss.sum"].sum()) / count if count else None,
        "metrics": metrics,
        **seconds,
        "trained": len(screened.updates),
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "set_aside": screened.set_aside,
        "model_sha256": tensors_sha256(run.tensors),
    }
