"""The tensors that clients keep for themselves: the head, normalisation layers, or LoRA's B."""

from __future__ import annotations

from atoll.backbones.encoder import Model
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.factors import B


def own_part(model: Model, job: Job) -> Tensors:
    """Copies of the trained tensors that clients keep, by name, on the CPU.

    `head`: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers" (FedPer). `norms`: Li
    et al. 2021, "FedBN"; only scales and shifts, since statistics never change here. `lora-b`: Guo et al.
    2024, "Selective Aggregation for Low-Rank Adaptation" (FedSA-LoRA): A, which learns what clients have in
    common, is merged, and B, which differs between clients, stays.

    Raises:
        ConfigError: the model has no such tensors, or no others are trained.
    """
    of_head = {id(p) for p in model.head.parameters()}
    of_norms = {id(p) for m in model.modules() if trainable.is_norm(m) for p in m.parameters()}
    trained = trainable.trainable(model)
    of_b = {id(p) for name, p in trained.items() if name.endswith(B)}
    assert job.personal.keep is not None
    chosen = {"head": of_head, "norms": of_norms, "lora-b": of_b}[job.personal.keep]
    names = [name for name, p in trained.items() if id(p) in chosen]
    if not names:
        raise ConfigError(f"personal.keep: no {job.personal.keep} among what this job tunes, expected none")
    if len(names) == len(trained):
        raise ConfigError(f"personal.keep: {job.personal.keep} is all that this job tunes, expected less")
    return {name: trainable.contiguous(trained[name].detach()).cpu() for name in names}
