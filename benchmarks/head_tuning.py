"""Head tuning: 1,000 clients of 50 examples (384 features, 10 classes, Dirichlet 0.3), 100 a round.

One local epoch, batches of 10, SGD 0.1, FedAvg weighted by examples, 20 rounds. Systems take
turns, a repetition each, and the table gives medians over the repetitions, in seconds a round
and in ratios. Atoll is measured end to end through its engine: sampling, screening, merging,
logging and a checkpoint every round included. The features are generated.

    python benchmarks/head_tuning.py [--repeats 5] [--rounds 20] [--without-flower]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

CLIENTS, COHORT, EXAMPLES, WIDTH, CLASSES, ALPHA = 1000, 100, 50, 384, 10, 0.3
BATCH, LR = 10, 0.1


@dataclass(frozen=True)
class Data:
    """Generated features of every client, and a test set."""

    features: torch.Tensor
    targets: torch.Tensor
    test_features: torch.Tensor
    test_targets: torch.Tensor

    @classmethod
    def make(cls) -> Data:
        """Gaussian classes; each client's class shares are drawn from Dirichlet(0.3)."""
        rng = np.random.default_rng(0)
        means = 0.15 * rng.normal(size=(CLASSES, WIDTH))
        shares = rng.dirichlet([ALPHA] * CLASSES, CLIENTS)
        targets = np.stack([rng.choice(CLASSES, EXAMPLES, p=share) for share in shares])
        test = rng.integers(0, CLASSES, 5000)

        def features(labels: np.ndarray) -> torch.Tensor:
            noisy = means[labels] + rng.normal(size=(*labels.shape, WIDTH))
            return torch.from_numpy(noisy.astype(np.float32))

        return cls(features(targets), torch.from_numpy(targets), features(test), torch.from_numpy(test))

    def accuracy(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Of a linear head on the test set."""
        found = (self.test_features @ weight.T + bias).argmax(1)
        return float((found == self.test_targets).float().mean())


Outcome = tuple[list[float], float]
"""(seconds of every round, accuracy at the end)."""


def atoll(data: Data, rounds: int, workers: int) -> Outcome:
    """Atoll's in-process engine on a population whose features are in the cache."""
    from benchmarks.generated import population_of
    from server.rounds import all_rounds, open_run
    from server.rundir import RunDirectory
    from sim.inline import InlineCarrier

    with tempfile.TemporaryDirectory() as folder:
        population = population_of(data.features, data.targets, Path(folder), cohort=COHORT, rounds=rounds,
                                   train={"batch_size": BATCH, "lr": LR})  # fmt: skip
        carrier = InlineCarrier.of(population, workers)
        with RunDirectory.open(Path(folder) / "run", population.job, resume=False, force=False) as directory:
            run = open_run(
                population.job, carrier, directory, lambda learner: None, lambda *step: None, resume=False
            )
            directory.settle()
            all_rounds(run)
        accuracy = data.accuracy(run.tensors["head.weight"], run.tensors["head.bias"])
        return [line["seconds"] for line in run.log], accuracy


def plain_loop(data: Data, rounds: int) -> Outcome:
    """nn.Linear and torch.optim.SGD, one client after the other; the mean of state dicts."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    model = torch.nn.Linear(WIDTH, CLASSES)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        total = {n: torch.zeros_like(p) for n, p in state.items()}
        for client in rng.choice(CLIENTS, COHORT, replace=False):
            train_plainly(model, state, data.features[client], data.targets[client], rng)
            for n, p in model.named_parameters():
                total[n] += p.detach()
        model.load_state_dict({n: t / COHORT for n, t in total.items()})
        seconds.append(time.perf_counter() - start)
    return seconds, data.accuracy(model.weight.detach(), model.bias.detach())


def train_plainly(
    model: torch.nn.Linear,
    state: dict[str, torch.Tensor],
    features: torch.Tensor,
    targets: torch.Tensor,
    rng: np.random.Generator,
) -> None:
    """One local epoch from `state`."""
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    order = torch.from_numpy(rng.permutation(EXAMPLES))
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features[rows]), targets[rows]).backward()
        optimizer.step()


def bare_products(data: Data, rounds: int) -> Outcome:
    """The round's batched matrix products alone, two a step: nothing is learnt."""
    torch.set_num_threads(1)
    inputs = (
        data.features[:COHORT].reshape(COHORT, EXAMPLES // BATCH, BATCH, WIDTH).transpose(0, 1).contiguous()
    )
    weight = torch.zeros(COHORT, CLASSES, WIDTH)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for batch in inputs:
            logits = torch.bmm(batch, weight.transpose(1, 2))
            torch.bmm(logits.transpose(1, 2), batch)
        seconds.append(time.perf_counter() - start)
    return seconds, float("nan")


def one_large_product(data: Data, rounds: int) -> Outcome:
    """As many floating-point operations as the products of a round, in one pair of products."""
    torch.set_num_threads(1)
    inputs = data.features[:COHORT].reshape(-1, WIDTH)
    weight = torch.zeros(CLASSES, WIDTH)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        logits = inputs @ weight.T
        _ = logits.T @ inputs
        seconds.append(time.perf_counter() - start)
    return seconds, float("nan")


def flower(data: Data, rounds: int) -> Outcome:
    """Flower's simulation engine on Ray, two actors, FedAvg; the client trains as in the plain loop."""
    from benchmarks.flower_peer import simulate

    return simulate(data, rounds)


def systems(with_flower: bool) -> dict[str, Callable[[Data, int], Outcome]]:
    """What is compared, slowest last."""
    found: dict[str, Callable[[Data, int], Outcome]] = {
        "one large product": one_large_product,
        "batched products alone": bare_products,
        "Atoll, 2 threads": lambda data, rounds: atoll(data, rounds, 2),
        "Atoll, 1 thread": lambda data, rounds: atoll(data, rounds, 1),
        "plain PyTorch loop": plain_loop,
    }
    return found | ({"Flower's engine, 2 actors": flower} if with_flower else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without-flower", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = Data.make()
    times: dict[str, list[float]] = {}
    accuracies: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, system in systems(not options.without_flower).items():
            seconds, accuracies[name] = system(data, options.rounds)
            times.setdefault(name, []).append(statistics.median(seconds[1:]))
    reference = statistics.median(times["Atoll, 2 threads"])
    print(f"{os.cpu_count()} cores, {options.repeats} repetitions of {options.rounds} rounds, medians")
    print(f"{'':<28}{'ms a round':>12}{'clients/s':>12}{'Atoll is':>10}{'accuracy':>10}")
    for name, values in times.items():
        middle = statistics.median(values)
        row = f"{name:<28}{middle * 1e3:>12.2f}{COHORT / middle:>12,.0f}{middle / reference:>9.1f}x"
        print(row + f"{accuracies[name]:>10.3f}")


if __name__ == "__main__":
    main()
