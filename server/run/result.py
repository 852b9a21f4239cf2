"""Writes the end of a run: `result.json` and the model."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atoll import plugins
from atoll.job.privacy import cohort_is_secret
from atoll.learning.features import processor
from atoll.protocol.messages import Measurement
from atoll.protocol.tensors import size_of, tensors_sha256
from atoll.report.run_result import Compression, Plugin, RoundLine, RunResult, Sample
from atoll.server.contributions.measured import run_contributions
from atoll.server.rounds.evaluation import evaluate_clients
from atoll.server.rounds.participation import elapsed
from atoll.server.rounds.run_state import Run
from atoll.server.run.personalization_metrics import (
    personalization_metrics,
    personalization_notes,
    with_adapted,
)
from atoll.server.run.privacy_report import privacy_report
from atoll.system.installed import version_of
from atoll.system.memory import PeakMemory
from atoll.tasks.metric_values import MetricValues

Baselines = Mapping[str, Mapping[str, float | None]]


def write_result(
    run: Run, baselines: Baselines, seconds: float, notes: list[str], memory: PeakMemory
) -> RunResult:
    """Evaluate the final model at server and clients, write model and `result.json`, return the result."""
    setup, state, job = run.setup, run.state, run.setup.job
    clients = measured_clients(run)
    if job.evaluate.adapt is not None:
        clients = with_adapted(clients, measured_clients(run, adapt_steps=job.evaluate.adapt))
    keep = job.personal.keep
    shared = measured_clients(run, of_shared_model=True) if keep in ("norms", "lora-b", "mixture") else {}
    personal = None if keep is None else personalization_metrics(keep, clients, shared)
    bytes_up, bytes_down = traffic(run)
    result = RunResult(
        name=job.name,
        job_hash=job.hash,
        model_sha256=tensors_sha256(state.tensors),
        engine=setup.carrier.engine,
        task=job.task.name,
        strategy=setup.strategy_name,
        seed=job.seed,
        seconds=seconds,
        simulated_seconds=elapsed(state.log) or None,
        population=len(setup.population),
        data=setup.used_data,
        clients_trained=sum(line["trained"] for line in state.log),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        peak_rss_mb=memory.mb(),
        rounds=[*state.log],
        final={"server": final_server(run), "clients": clients},
        personal=personal,
        baselines=_references(run) | {name: dict(metrics) for name, metrics in baselines.items()},
        privacy=privacy_report(run),
        compression=compression_of(run),
        facts=state.learner.data_info,
        backbone={"name": job.backbone.name, "origin": state.learner.backbone.origin},
        trainable={n: list(t.shape) for n, t in state.tensors.items()},
        machine=machine(job.train.threads, job.train.device),
        notes=[
            *notes, *setup.remarks, *private_notes(run), *cluster_notes(state.log),
            *personalization_notes(job, personal, clients, state.learner.task.primary_metric),
        ],
        contributions=run_contributions(run),
        samples=_samples(run) or None,
        plugins=[Plugin(file=plugin.file, sha256=plugin.sha256) for plugin in plugins.files()] or None,
    )  # fmt: skip
    setup.directory.save_model(
        state.tensors if run.full_model is None else run.full_model,
        {"job": state.learner.job.model_dump(mode="json"), "facts": state.learner.data_info},
    )
    result.write(setup.directory.path)
    return result


def _samples(run: Run) -> list[Sample]:
    """Prompts of the server's test set, with the model's texts before and after training."""
    before, test, model = run.setup.samples_before, run.setup.test, run.full_model
    if not before or test is None or model is None:
        return []
    pairs = zip(before, run.state.learner.samples(model, test), strict=True)
    return [
        Sample(prompt=b.prompt, before=b.written, after=a.written, reference=b.reference) for b, a in pairs
    ]


def traffic(run: Run) -> tuple[int, int]:
    """(bytes up, bytes down) of the run; expected values where the actual ones would reveal who took part."""
    if cohort_is_secret(run.setup.job):
        return (run.state.log[-1]["bytes_up"], run.state.log[-1]["bytes_down"]) if run.state.log else (0, 0)
    return run.state.bytes_up, run.state.bytes_down


def compression_of(run: Run) -> Compression | None:
    """The compression of updates and how many times smaller they are; None without compression."""
    scheme = run.setup.job.federation.compression
    if scheme is None:
        return None
    sent, whole = run.update_bytes(1), size_of(run.trained_in_round(1))
    smaller = whole / sent if sent else 1.0
    return {"scheme": scheme, "times_smaller": smaller}


def private_notes(run: Run) -> list[str]:
    """Notes on what the result leaves out for privacy, and on a run that ended before its last round."""
    notes = []
    if run.is_private:
        notes.append("training losses and the clients' own measurements are left out: they are not noised")
    if cohort_is_secret(run.setup.job):
        notes.append("who took part is secret: numbers of clients and bytes are expected values")
    if run.state.ended_early:
        notes.append(run.state.ended_early)
    return notes


def cluster_notes(rounds: Sequence[RoundLine]) -> list[str]:
    """How many clients each cluster's model had in the last round, where there are clusters."""
    if not rounds or "clusters" not in rounds[-1]:
        return []
    sizes = [len(names) for names in rounds[-1]["clusters"]]
    counts = ", ".join(f"{size} of cluster {number}" for number, size in enumerate(sizes))
    return [
        f"clients of the last round: {counts}; each is measured with the model that fits it, and there is"
        " none of all"
    ]


def _references(run: Run) -> dict[str, MetricValues]:
    """Metrics of predictions that need no training, on the server's test set."""
    return {} if run.setup.test is None else run.state.learner.naive_baselines(run.setup.test)


def final_server(run: Run) -> MetricValues:
    """Metrics of the final model on the server's test set; empty where the server has none."""
    if run.setup.test is None or run.full_model is None:
        return {}
    return run.state.learner.compute(run.state.learner.evaluate(run.full_model, run.setup.test))


def measured_clients(
    run: Run, *, adapt_steps: int = 0, of_shared_model: bool = False
) -> dict[str, MetricValues]:
    """Each evaluation client's metrics, by name."""
    measurements = evaluate_clients(run, adapt_steps=adapt_steps, of_shared_model=of_shared_model)
    return {m.client: _client(run, m) for m in measurements}


def _client(run: Run, measurement: Measurement) -> MetricValues:
    metrics = run.state.learner.compute(measurement.states) if measurement.num_examples else {}
    return metrics | {"examples": measurement.num_examples}


def machine(threads: int, device: str) -> dict[str, Any]:
    """All on which a run's bits depend besides the job: processor, libraries, threads and device."""
    packages = ("torch", "torchvision", "transformers", "peft", "flwr", "numpy")
    return {
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": " ".join(processor(device)),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages},
    }
