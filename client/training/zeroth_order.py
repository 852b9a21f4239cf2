"""Local steps without gradients, along directions that a seed draws: FedKSeed (Qin et al. 2024, algorithm 1).

In each local step one of the K directions z_k is drawn, with even chances, and the loss L of the batch is
taken on both sides of the weights w, at the distance of `tune.perturbation`, eps:

    g = (L(w + eps z_k) - L(w - eps z_k)) / (2 eps)
    a_k <- a_k - lr g          and so          w <- w - lr g z_k

g z_k is the SPSA estimate of the gradient (Spall 1992), whose expectation over z is the gradient itself, up
to eps^2. Where the paper takes w +- eps z in place, after MeZO (Malladi et al. 2023), here w is a copy to
which each step adds exactly lr g z_k: no rounding of the perturbations is left in it. In memory are w0, the
round's w, the client's w, z_k and the network's own weights; neither gradients nor activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atoll.backbones.encoder import Model
from atoll.client.training.learning_rates import StepRates
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.directions import COEFFICIENTS, directions_of
from atoll.protocol.random_streams import global_stream, stream
from atoll.protocol.tensors import Tensors

BatchLoss = Callable[[], float]
"""Returns the loss of one batch with the network's weights at the time of the call."""


def drawn_directions(job: Job, round: int, client: str, steps: int) -> list[int]:
    """The number k of the direction in each of a client's local steps, each in [0, K)."""
    generator = stream(job.seed, "directions", round, client)
    numbers: list[int] = torch.randint(job.tune.num_seeds, (steps,), generator=generator).tolist()
    return numbers


def step_along_directions(
    model: Model, job: Job, rates: StepRates, loss_of: Callable[[int], BatchLoss], *,
    client: str, round: int, steps: int,
) -> list[float]:  # fmt: skip
    """Take a client's local steps from the model's present weights; the loss of each, the mean of both sides.

    `loss_of` maps a step's number, from 0, to the loss of its batch. `train.clip_norm` limits |g|, which is
    the norm of the gradient of a. The network's random draws are the same on both sides.
    """
    directions, limit, distance = directions_of(model), job.train.clip_norm, job.tune.distance
    assert directions is not None, "only a model with coefficients is trained so"
    coefficients, losses = model.get_parameter(COEFFICIENTS), []
    with torch.no_grad():
        weights = {name: w.clone() for name, w in directions.weights(coefficients).items()}
        for step, number in enumerate(drawn_directions(job, round, client, steps)):
            direction, loss = dict(directions.draw(number)), loss_of(step)
            sides = []
            for far in (distance, -distance):
                _look_beside(model, weights, direction, far)
                with global_stream(job.seed, "dropout", round, client, step):
                    sides.append(loss())
            slope = (sides[0] - sides[1]) / (2 * distance)
            if limit is not None:
                slope = max(-limit, min(limit, slope))
            change = -rates.lr * rates.factor(step) * slope
            coefficients[number] += change
            for name, part in direction.items():
                weights[name] += part.mul_(change)
            losses.append(sum(sides) / 2)
    return losses


def _look_beside(model: Model, weights: Tensors, direction: Tensors, far: float) -> None:
    """Set the network's weights to `weights` plus `far` times a direction; pruned weights stay zero."""
    for name, part in direction.items():
        model.get_parameter(name).copy_(weights[name] + part * far)
    trainable.keep_pruned(model)
