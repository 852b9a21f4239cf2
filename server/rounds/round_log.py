"""The line that each round writes into `metrics.jsonl` and `result.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from atoll.job.privacy import expected_cohort, unless_secret
from atoll.protocol.messages import CHARGED_ROUNDS, CLUSTER, Update
from atoll.protocol.stacked_updates import stacked_states
from atoll.protocol.tensors import size_of, tensors_sha256
from atoll.report.run_result import LayerError, PublicFields, RoundExtras, RoundLine
from atoll.server.rounds import tuning_schedule
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.validation import ValidatedUpdates
from atoll.strategies import State
from atoll.strategies.lora.merge import aggregation_errors
from atoll.strategies.mean import sent_numbers
from atoll.strategies.options import clusters_of
from atoll.tasks.metric_values import MetricValues


def log_line(
    run: Run,
    cohort: Sequence[str],
    gathered: ValidatedUpdates,
    metrics: MetricValues,
    extras: RoundExtras,
) -> RoundLine:
    """The log line of the run's last round; under privacy it holds nothing that depends on clients' data."""
    state = run.state
    states = stacked_states(gathered.updates) if gathered.updates else {}
    count = float(states["train_loss.count"].sum()) if states else 0.0
    line: RoundLine = {
        "round": state.round,
        "cohort": list(cohort),
        "loss": float(states["train_loss.sum"].sum()) / count if count and not run.is_private else None,
        "metrics": metrics,
        **extras,
        "trained": gathered.num_valid,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "set_aside": gathered.set_aside,
        "model_sha256": tensors_sha256(state.tensors),
        **tuning_schedule.log_fields(run),
        **_aggregation_error(state.strategy_state),
        **_staleness(gathered.staleness),
        **_assigned_steps(gathered.assigned_steps),
        **_clusters(gathered.updates, clusters_of(run.setup.job)),
    }
    charged = int(states[CHARGED_ROUNDS].max()) if CHARGED_ROUNDS in states else gathered.charged_rounds
    if charged:
        line["charged_rounds"] = max(charged, charged_rounds(run))
    public: RoundLine = {**line, **_public_fields(run, line)}
    return unless_secret(run.setup.job, line, public)


def _aggregation_error(state: State) -> RoundExtras:
    """How far merged LoRA adapters are from the mean of the clients' products, where factors are merged."""
    errors = aggregation_errors(state)
    if not errors:
        return {}
    whole = math.hypot(*(error for error, _ in errors.values()))
    layers: dict[str, LayerError] = {
        name: {"frobenius": error, "relative": relative} for name, (error, relative) in errors.items()
    }
    return {"aggregation_error": {"frobenius": whole, "layers": layers}}


def _staleness(merges: Sequence[int]) -> RoundExtras:
    """How late the round's updates were, in merges; empty in synchronous rounds."""
    return {"staleness": {"mean": sum(merges) / len(merges), "max": max(merges)}} if merges else {}


def _assigned_steps(steps: Mapping[str, int]) -> RoundExtras:
    """How many local steps the server gave each of the round's clients; empty where the job says how many."""
    return {"assigned_steps": dict(steps)} if steps else {}


def _clusters(updates: Sequence[Update], count: int) -> RoundExtras:
    """Which clients chose each cluster's model in the round, where there are clusters."""
    if not count:
        return {}
    chosen = sent_numbers(updates, CLUSTER) if updates else {}
    return {"clusters": [[name for name, cluster in chosen.items() if cluster == n] for n in range(count)]}


def charged_rounds(run: Run) -> int:
    """The largest number of this run's rounds in any client's ledger, among the clients that reported it."""
    log = run.state.log
    return int(log[-1].get("charged_rounds", 0)) if log else 0


def _public_fields(run: Run, line: RoundLine) -> PublicFields:
    """The public values that replace the line's fields about participants, where participation is secret.

    With a simulated clock that is the round's duration, but not how many clients were unavailable or late.
    """
    expected, rounds = expected_cohort(run.setup.job), run.state.round
    clock = line.get("simulated")
    fields: PublicFields = {
        "cohort": [],
        "trained": round(expected),
        "set_aside": {},
        "bytes_up": sum(round(expected * run.update_bytes(n)) for n in (1, 2)) * (rounds // 2)
        + round(expected * run.update_bytes(1)) * (rounds % 2),
        "bytes_down": round(expected * size_of(run.state.tensors)) * rounds,
    }
    if clock is not None:
        fields["simulated"] = {"seconds": clock["seconds"], "elapsed": clock["elapsed"]}
    return fields
