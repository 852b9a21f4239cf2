"""FedJAX: its federated averaging on the jit backend of `for_each_client`.

One compiled step serves every client. The pmap backend, over two host devices, fails with the
newest JAX that FedJAX still works with. What made it faster on two cores is set here: for a linear
head, whose steps are short, the older XLA runtime and one core instead of handing work from thread
to thread (.035 instead of .059 s a round); for the CNN XLA's defaults are best.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms.fed_avg import federated_averaging

from benchmarks.workload import Array, Outcome, Workload, seconds_between

HIDDEN = 288
Params = dict[str, jax.Array]
Network = Callable[[Params, Any], jax.Array]


def linear(params: Params, inputs: Any) -> jax.Array:
    """Logits of a linear head."""
    return inputs @ params["weight"] + params["bias"]


def cnn(params: Params, images: Any) -> jax.Array:
    """Logits of the small CNN; images are [batch, height, width, channel]."""
    for layer in ("1", "2"):
        kernel = params[f"kernel{layer}"]
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        images = jax.nn.relu(images + params[f"shift{layer}"])
        images = jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["hidden"] + params["hidden_bias"])
    return linear(params, hidden)


def fresh(workload: Workload) -> tuple[Network, Params]:
    """A network and initial values as torch draws them: uniform up to 1 / sqrt(inputs of a unit)."""
    rng = np.random.default_rng(1)

    def draw(*shape: int, inputs: int) -> jax.Array:
        return jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(inputs), jnp.float32)

    def last(width: int) -> Params:
        classes = workload.classes
        return {"weight": draw(width, classes, inputs=width), "bias": draw(classes, inputs=width)}

    if workload.network == "linear":
        return linear, last(workload.inputs.shape[1])
    flat = 64 * 8 * 8
    return cnn, last(HIDDEN) | {
        "kernel1": draw(3, 3, 3, 32, inputs=27),
        "shift1": draw(32, inputs=27),
        "kernel2": draw(3, 3, 32, 64, inputs=288),
        "shift2": draw(64, inputs=288),
        "hidden": draw(flat, HIDDEN, inputs=flat),
        "hidden_bias": draw(HIDDEN, inputs=flat),
    }


def arranged(inputs: Array) -> Array:
    """Images with their channels last, as XLA likes them; features as they are."""
    return np.ascontiguousarray(inputs.transpose(0, 2, 3, 1)) if inputs.ndim == 4 else inputs


def accuracy(network: Network, params: Params, workload: Workload) -> float:
    """On the test set."""
    parts = np.array_split(arranged(workload.test_inputs), 10)
    found = np.concatenate([np.asarray(network(params, part)).argmax(1) for part in parts])
    return float((found == workload.test_targets).mean())


def tune_for_short_steps() -> None:
    """Must come before JAX computes anything."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_thunk_runtime=false")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def simulate(path: Path) -> Outcome:
    """(seconds of every round, accuracy); a round ends when its parameters are there."""
    workload = Workload.load(path)
    if workload.network == "linear":
        tune_for_short_steps()
    network, params = fresh(workload)

    def loss(params: Params, batch: Any, _: Any) -> jax.Array:
        outputs = jax.nn.log_softmax(network(params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(outputs, batch["y"][:, None], axis=1))

    federation = fedjax.InMemoryFederatedData(
        {
            str(place).encode(): {"x": arranged(inputs), "y": targets.astype(np.int32)}
            for place, (inputs, targets) in enumerate(map(workload.client, range(workload.clients)))
        }
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(federation, workload.cohort, seed=1)
    algorithm = federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(workload.lr),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch, num_epochs=1),
    )
    state = algorithm.init(params)
    times = [time.perf_counter()]
    for _ in range(workload.rounds):
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        times.append(time.perf_counter())
    return seconds_between(times), accuracy(network, state.params, workload)
