"""LoRA's factors as a folder that peft reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from atoll.job.job import Job
from atoll.learning.lora_base import ADDED
from atoll.learning.trainable import contiguous
from atoll.protocol.tensors import Tensors, to_bytes
from atoll.strategies.lora.factors import Factors
from atoll.strategies.lora.merge import ADDS_TO_BASE

NEGLIGIBLE = 1e-6
"""The part of a matrix' Frobenius norm that its factors may leave out: about what float32 has lost of it."""


def write_adapter(layers: list[tuple[str, BaseTunerLayer]], job: Job, folder: Path) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained` wants them.

    Where the server added to frozen weights, the adapter is of the pretrained ones all the same: it has the
    sum of what was added and of the factors' product, in as many dimensions as that takes.
    """
    folder.mkdir()
    factors: Tensors = {}
    ranks: dict[str, int] = {}
    for name, layer in layers:
        b, a = adapter_of(layer)
        ranks[name] = len(a)
        for factor, weight in (("lora_A", a), ("lora_B", b)):
            factors[f"base_model.model.{name}.{factor}.weight"] = contiguous(weight).cpu()
    (folder / "adapter_model.safetensors").write_bytes(to_bytes(factors))
    first: Any = layers[0][1]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": job.backbone.name.removeprefix("hf:"),
        "r": int(first.r["default"]),
        "lora_alpha": first.lora_alpha["default"],
        "target_modules": [name for name, _ in layers],
        "inference_mode": True,
    }
    if job.tune.lora_merge in ADDS_TO_BASE:  # each layer has a rank of its own, and is scaled by 1
        config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    elif job.tune.rslora:
        config["use_rslora"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) that make the pretrained weight what it is now; scaled by 1 where the server added to it."""
    b, a = (factor["default"].weight.detach() for factor in (layer.lora_B, layer.lora_A))
    if ADDED not in vars(layer):
        return b, a
    product = b.to(torch.float64).flatten(1) @ a.to(torch.float64).flatten(1)
    factors = factors_of(vars(layer)[ADDED].to(product) + layer.scaling["default"] * product)
    return factors.b.reshape(len(b), -1, *b.shape[2:]).to(b), factors.a.reshape(-1, *a.shape[1:]).to(a)


def factors_of(matrix: torch.Tensor) -> Factors:
    """Factors of the least rank whose product is the matrix [out, in], but for what is negligible."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    left_out = s.flip(0).square().cumsum(0).flip(0).sqrt()
    rank = max(1, int((left_out > NEGLIGIBLE * left_out[0]).sum()))
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * v[:rank])
