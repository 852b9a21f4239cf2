"""Local steps in a strategy's plan: how many the server gives its clients, and counting them for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from atoll.job.job import Job
from atoll.job.train import TrainSection
from atoll.protocol.messages import ASSIGNED_STEPS, LOCAL_STEPS, Update
from atoll.protocol.stacked_updates import with_state


def with_assigned_steps(job: Job, plan: Mapping[str, float]) -> Job:
    """The job with as many local steps as the plan gives the clients; the same job where it gives none."""
    if ASSIGNED_STEPS not in plan:
        return job
    return job.model_copy(update={"train": job.train.with_steps(int(plan[ASSIGNED_STEPS]))})


def examples_seen(counts: Sequence[int], train: TrainSection) -> torch.Tensor:
    """How many examples each client's local steps process in a round, [clients], float64."""
    return torch.tensor([train.examples_seen(count) for count in counts], dtype=torch.float64)


def accumulated_steps(examples: int, train: TrainSection) -> float:
    """The sum of the weights that local gradients have in the update of a client with `examples` examples.

    Under plain SGD it is the number of steps. With momentum rho a gradient counts again in every later step,
    which after tau steps sums up to (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)
    (Wang et al. 2020, section 4).

    >>> accumulated_steps(33, TrainSection(batch_size=16, epochs=2))
    6.0
    >>> accumulated_steps(32, TrainSection(batch_size=16, momentum=0.5))  # 1 + (1 + 0.5)
    2.5
    """
    steps, rho = train.local_steps(examples), train.momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


def with_local_steps(updates: Iterable[Update], train: TrainSection) -> Iterable[Update]:
    """The updates with `LOCAL_STEPS` among their states; stacked updates stay stacked."""
    return with_state(updates, LOCAL_STEPS, lambda client, examples: accumulated_steps(examples, train))
