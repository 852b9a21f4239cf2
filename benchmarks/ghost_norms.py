"""Private steps with examples' gradients laid out and by ghost norms: memory and seconds, beside plain steps.

A sum of 32 clipped gradients, of examples of 64 tokens, is taken twice in a process of its own. Memory is
the first one's peak above what the process held with the model loaded; seconds are the second one's. What is
looked at once before the first step is left out. Noise and the optimizer's step come on top, the same for
both; lines with "step" have them, beside a step without privacy on the same batch. Networks have random
weights, and dropout as they come. The ways take turns, a repetition each; the table gives medians.

    python -m benchmarks.ghost_norms [--repeats 5] [--threads 2] [--only "bert, 2 layers" ...]
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.real_networks import encoder

EXAMPLES = 32
TOKENS = 64
PRIVACY: dict[str, Any] = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 1.0, "clipping_norm": 1.0,
}  # fmt: skip
LAST_BLOCKS = {"method": "lora", "rank": 8, "layers": 2}
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
"""The sizes of SmolLM2-135M."""
CHATTING = {"method": "lora", "rank": 8, "layers": 4, "targets": ["q_proj", "v_proj"]}

Subject = tuple[str, dict[str, Any], dict[str, Any]]
SUBJECTS: dict[str, Subject] = {
    "bert, 2 layers": ("Bert", {"num_hidden_layers": 2, "vocab_size": 8000}, {"method": "full"}),
    "bert-base": ("Bert", {}, {"method": "full"}),
    "bert-base, LoRA": ("Bert", {}, LAST_BLOCKS),
    "smollm2-135m, LoRA": ("Llama", SMOLLM2, CHATTING),
}  # fmt: skip
"""What of the configuration isn't its class's default (BERT-base), and what is tuned."""

STEPS = ("step, laid out", "step, ghost norms", "plain step")
WAYS: dict[str, tuple[str, ...]] = {
    "bert, 2 layers": ("laid out", "ghost norms"),
    "bert-base": ("ghost norms",),
    "bert-base, LoRA": STEPS,
    "smollm2-135m, LoRA": STEPS,
}
"""Of BERT-base 32 gradients take 14 GB, and their squares as much again."""


def job_of(subject: str, way: str, folder: Path, threads: int) -> Any:
    """The job of a subject with 32 examples in a file."""
    from atoll.job.job import Job

    kind, options, tune = SUBJECTS[subject]
    network = encoder(folder, f"{kind}Config", **options)
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for number in range(2 * EXAMPLES):  # some are kept back
            words = [f"room {(number * 31 + place * 7) % 97} was light today" for place in range(TOKENS)]
            rows.writerow([" ".join(words), ("light", "dark")[number % 2]])
    data: dict[str, Any] = {"source": str(folder / "texts.csv"), "validation_fraction": 0.0}
    task: dict[str, Any] = {"name": "text-classification"}
    backbone = {"max_tokens": TOKENS}
    if kind == "Bert":
        data["classes"] = ["dark", "light"]
    else:
        task, backbone = {"name": "language-modeling", "options": {"max_tokens": TOKENS}}, {}
    private = {"privacy": PRIVACY | {"ghost_norms": "ghost" in way}} if way != "plain step" else {}
    table = {
        "name": "ghost-norms", "seed": 1, "task": task, "data": data,
        "tune": tune, "federation": {"clients": 1, "rounds": 1},
        "backbone": {"name": network, "weights": "random", **backbone},
        "train": {"lr": 0.001, "batch_size": EXAMPLES, "optimizer": "sgd", "threads": threads},
    } | private  # fmt: skip
    return Job.parse(table, origin="benchmark")


def work_of(job: Any, way: str) -> Callable[[], object]:
    """What is measured, after what happens once a run is done."""
    from contextlib import ExitStack
    from dataclasses import replace
    from unittest.mock import patch

    import numpy as np

    from atoll.client.dp.dp_sgd_model import clipped_sums, hooks_suffice_for, train_privately
    from atoll.client.dp.example_draws import example_numbers
    from atoll.client.dp.poisson import private_training
    from atoll.client.dp.private_examples import PrivateExamples
    from atoll.client.training.local_sgd import train_model
    from atoll.learning import trainable
    from atoll.learning.determinism import repeatable
    from atoll.learning.learner import Learner
    from atoll.privacy.dp_plan import dp_plan_of
    from atoll.sim.population.population import Population
    from atoll.tasks import task_named

    population = Population.of(job)
    learner = Learner.of(job, task_named(job.task.name), population.roster(job).data_info[0])
    shard, start = population.whole(learner).select(range(EXAMPLES)), learner.initial()
    trainable.training_mode(learner.model)
    if way == "plain step":
        return lambda: train_model(learner, start, shard, job, client="c", round=1, plan={})
    with ExitStack() as stack:
        for check in ("refuse_mixing_layers", "refuse_without_ghost_norms", "refuse_mixed_examples"):
            stack.enter_context(patch(f"atoll.client.dp.dp_sgd_model.{check}"))
        hooks_suffice_for(learner, shard)
    dp_plan = dp_plan_of(job, "example")
    assert dp_plan is not None
    private = replace(
        private_training(job, dp_plan, 1, {}), draw=lambda client, numbers: [np.arange(EXAMPLES)]
    )
    if way.startswith("step"):
        return lambda: train_privately(learner, start, shard, private, client="c", round=1, plan={})

    def summed() -> object:
        numbers = example_numbers(shard.keys)
        with repeatable("cpu"), clipped_sums(learner, shard) as clipped:
            examples = PrivateExamples(learner, shard, numbers, (1, "c", 0))
            return clipped(examples, np.arange(EXAMPLES), private, None)

    return summed


def memory_mb(key: str) -> float:
    """A line of this process's status: what it holds (`VmRSS`) or held at most (`VmHWM`)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024


def run(subject: str, way: str, threads: int) -> dict[str, float]:
    """Measure one way in this process, which has done nothing before."""
    import logging
    import warnings

    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        work = work_of(job_of(subject, way, Path(name), threads), way)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_mb("VmRSS")
        work()
        peak = memory_mb("VmHWM") - before
        begun = time.perf_counter()
        work()
    return {"peak_mb": peak, "seconds": time.perf_counter() - begun}


def main() -> None:
    """All ways in turns, and a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        subject, way = given.one
        sys.stdout.write(json.dumps(run(subject, way, given.threads)) + "\n")
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(given.repeats):
        for subject in given.only:
            for way in WAYS[subject]:
                command = [sys.executable, "-m", "benchmarks.ghost_norms", "--one", subject, way]
                command += ["--threads", str(given.threads)]
                ended = subprocess.run(command, capture_output=True, text=True, check=False)
                if ended.returncode:
                    sys.exit(f"{subject}, {way}: failed: {ended.stderr.strip().splitlines()[-1]}")
                found[subject, way].append(json.loads(ended.stdout.splitlines()[-1]))
    sys.stdout.write("| network | way | memory | seconds | tokens a second |\n|---|---|---|---|---|\n")
    for (subject, way), runs in found.items():
        peak, seconds = (statistics.median(run[key] for run in runs) for key in ("peak_mb", "seconds"))
        rate = EXAMPLES * TOKENS / seconds
        sys.stdout.write(f"| {subject} | {way} | {peak:,.0f} MB | {seconds:.2f} | {rate:,.0f} |\n")


if __name__ == "__main__":
    main()
