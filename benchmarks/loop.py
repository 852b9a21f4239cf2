"""FedAvg by hand: one client after the other in torch, and the weighted mean of their values."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.networks import accuracy, network_of, train_plainly
from benchmarks.workload import Outcome, Workload, seconds_between


def plain_loop(workload: Workload, threads: int) -> Outcome:
    """(seconds of every round, accuracy)."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(1)
    model = network_of(workload)
    shards = [tuple(map(torch.from_numpy, workload.client(place))) for place in range(workload.clients)]
    stamps = [time.perf_counter()]
    for _ in range(workload.rounds):
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        total = {n: torch.zeros_like(p) for n, p in state.items()}
        cohort = rng.choice(workload.clients, workload.cohort, replace=False)
        whole = int(workload.sizes[cohort].sum())
        for client in cohort:
            model.load_state_dict(state)
            inputs, targets = shards[client]
            train_plainly(model, inputs, targets, workload, rng)
            for n, p in model.named_parameters():
                total[n].add_(p.detach(), alpha=int(workload.sizes[client]) / whole)
        model.load_state_dict(total)
        stamps.append(time.perf_counter())
    return seconds_between(stamps), accuracy(model, workload)
