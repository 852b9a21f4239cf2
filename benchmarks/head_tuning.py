"""Head tuning: 1,000 clients of 50 examples (384 features, 10 classes, Dirichlet 0.3), 100 a round.

One local epoch, batches of 10, SGD 0.1, FedAvg weighted by examples, 20 rounds. Systems take
turns, a repetition each, and the table gives medians over the repetitions, in milliseconds a
round and in ratios. Atoll is measured end to end through its engine: sampling, screening, merging,
logging and a checkpoint every round included. The features are generated.

    python -m benchmarks.head_tuning [--repeats 5] [--rounds 20] [--only atoll,pfl-2] [--uneven]
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.loop import plain_loop
from benchmarks.turns import System, at_round_ends, chosen, options_of, peers, report, take_turns
from benchmarks.workload import Array, Outcome, Workload, seconds_between

CLIENTS, COHORT, EXAMPLES, WIDTH, CLASSES, ALPHA = 1000, 100, 50, 384, 10, 0.3
BATCH, LR = 10, 0.1
TOLERANCE = 0.02


def made(rounds: int, *, uneven: bool) -> Workload:
    """Gaussian classes; each client's class shares are drawn from Dirichlet(0.3)."""
    rng = np.random.default_rng(0)
    means = 0.15 * rng.normal(size=(CLASSES, WIDTH))
    shares = rng.dirichlet([ALPHA] * CLASSES, CLIENTS)
    sizes = np.full(CLIENTS, EXAMPLES)
    if uneven:
        sizes = np.exp(rng.uniform(np.log(5), np.log(201), CLIENTS)).astype(np.int64)
    targets = np.concatenate(
        [rng.choice(CLASSES, size, p=share) for size, share in zip(sizes, shares, strict=True)]
    )
    test = rng.integers(0, CLASSES, 5000)

    def features(labels: Array) -> Array:
        return (means[labels] + rng.normal(size=(len(labels), WIDTH))).astype(np.float32)

    return Workload(
        "linear", features(targets), targets, sizes, features(test), test, COHORT, BATCH, LR, rounds
    )


def atoll(workload: Workload, workers: int) -> Outcome:
    """Atoll's in-process engine on a population whose features are in the cache."""
    from atoll.server.rounds.loop import run_rounds
    from atoll.server.rounds.start import start_or_resume
    from atoll.server.run.directory import RunDirectory
    from atoll.sim.engines.inline import InlineTransport
    from benchmarks.generated import population_of

    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        population = population_of(workload, Path(folder))
        carrier = InlineTransport.of(population, workers)
        with RunDirectory.open(Path(folder) / "run", population.job, resume=False, force=False) as directory:
            run = start_or_resume(
                population.job,
                carrier,
                directory,
                lambda learner: None,
                at_round_ends(stamps),
                resume=False,
            )
            directory.commit()
            stamps.append(time.perf_counter())
            run_rounds(run)
    head = {name: tensor.numpy() for name, tensor in run.state.tensors.items()}
    outputs = workload.test_inputs @ head["head.weight"].T + head["head.bias"]
    return seconds_between(stamps), float((outputs.argmax(1) == workload.test_targets).mean())


def batches_of_a_round(workload: Workload) -> torch.Tensor:
    """As many batches as a cohort has on average, as if its clients were of one size."""
    steps = max(1, round(len(workload.targets) / workload.clients / BATCH))
    rows = torch.from_numpy(workload.inputs[: COHORT * steps * BATCH])
    return rows.reshape(COHORT, steps, BATCH, WIDTH).transpose(0, 1).contiguous()


def bare_products(workload: Workload) -> Outcome:
    """The round's batched products alone, one a step forward and one backward: nothing is learnt."""
    torch.set_num_threads(1)
    inputs = batches_of_a_round(workload)
    weight = torch.zeros(COHORT, CLASSES, WIDTH)
    stamps = [time.perf_counter()]
    for _ in range(workload.rounds):
        for batch in inputs:
            logits = torch.bmm(batch, weight.transpose(1, 2))
            torch.bmm(logits.transpose(1, 2), batch)
        stamps.append(time.perf_counter())
    return seconds_between(stamps), float("nan")


def one_large_product(workload: Workload) -> Outcome:
    """As many floating-point operations as the products of a round, in one pair of products."""
    torch.set_num_threads(1)
    inputs = batches_of_a_round(workload).reshape(-1, WIDTH)
    weight = torch.zeros(CLASSES, WIDTH)
    stamps = [time.perf_counter()]
    for _ in range(workload.rounds):
        logits = inputs @ weight.T
        _ = logits.T @ inputs
        stamps.append(time.perf_counter())
    return seconds_between(stamps), float("nan")


def systems(workload: Workload, path: Path) -> list[System]:
    """What is compared, slowest last."""
    return [
        System("large", "one large product", lambda: one_large_product(workload), limit=True),
        System("bare", "batched products alone", lambda: bare_products(workload), limit=True),
        System("atoll-2", "Atoll, 2 threads", lambda: atoll(workload, 2)),
        System("atoll-1", "Atoll, 1 thread", lambda: atoll(workload, 1)),
        System("loop-1", "plain PyTorch loop, 1 thread", lambda: plain_loop(workload, 1)),
        System("loop-2", "plain PyTorch loop, 2 threads", lambda: plain_loop(workload, 2)),
        # steps are so short that a second thread costs the others more than it helps
        *peers(path, threads=1),
    ]


def main() -> int:
    """Run, and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--uneven", action="store_true", help="clients of 5 to 200 examples, log-uniform")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    workload = made(options.rounds, uneven=options.uneven)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.safetensors"
        workload.save(path)
        rows = take_turns(chosen(systems(workload, path), options.only), options.repeats)
    sizes = "clients of 5 to 200 examples" if options.uneven else f"clients of {EXAMPLES} examples"
    print(f"head tuning, {CLIENTS:,} {sizes}, {COHORT} a round, {WIDTH} features, {CLASSES} classes")
    return report(rows, workload, options.repeats, tolerance=TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
