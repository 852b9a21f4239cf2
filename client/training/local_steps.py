"""How many local steps a client's update is made of, for strategies that ask (`local_steps` in the plan)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from atoll.job.train import TrainSection
from atoll.protocol.messages import LOCAL_STEPS, Update
from atoll.protocol.stacked_updates import with_state


def examples_seen(counts: Sequence[int], train: TrainSection) -> torch.Tensor:
    """How many examples the steps of each of several clients see in a round, [clients] in float64."""
    return torch.tensor([train.examples_seen(count) for count in counts], dtype=torch.float64)


def accumulated_steps(examples: int, train: TrainSection) -> float:
    """The sum of the weights that local gradients have in an update of so many examples.

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
    """The updates with their steps among the states; a cohort's stay stacked."""
    return with_state(updates, LOCAL_STEPS, lambda client, examples: accumulated_steps(examples, train))
