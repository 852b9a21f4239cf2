"""Which tensors are trained and travel: the head, the last blocks, LoRA factors, or all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from protocol.errors import ConfigError
from protocol.job import TuneSection
from protocol.streams import global_stream
from protocol.tensors import Tensors
from tasks.seam import Model

Norms = (nn.modules.batchnorm._BatchNorm,)


def mark_trainable(model: Model, tune: TuneSection, seed: int) -> None:
    """Leave `requires_grad` on exactly what the job tunes; the head is always tuned.

    Raises:
        ConfigError: nothing matches `tune.targets`, or there are fewer blocks than `tune.layers`.
    """
    model.requires_grad_(False)
    match tune.method:
        case "last-k":
            for module in _last_blocks(model.backbone, tune.layers or 1):
                module.requires_grad_(True)
        case "lora":
            _inject_lora(model, tune, seed)
        case "full":
            model.requires_grad_(True)
    model.head.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tuned parameters by name: what travels and what is hashed."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> Tensors:
    """Copies of the tuned parameters' values."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def load_values(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the tuned parameters of the same names."""
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(tensors[name])


def training_mode(module: nn.Module, inherited: bool = True) -> None:
    """Dropout works where something is tuned; the statistics of batch norm never move."""
    parameters = list(module.parameters())
    tuned = any(p.requires_grad for p in parameters) if parameters else inherited
    module.training = tuned and not isinstance(module, Norms)
    for child in module.children():
        training_mode(child, module.training)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The network as a sequence of blocks, in order, from input to output.

    Containers, and whatever holds most of the parameters of its parent, are opened; a block is
    what is left: a transformer layer, a residual unit.
    """
    parts = list(module.children()) if isinstance(module, nn.Sequential | nn.ModuleList) else [module]
    opened: list[nn.Module] = []
    for part in parts:
        opened += _open(part)
    return [b for b in opened if any(True for _ in b.parameters())]


def _open(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    lists = [c for c in children if isinstance(c, nn.Sequential | nn.ModuleList)]
    if isinstance(module, nn.ModuleList) or not children:
        return children or [module]
    if _is_trunk(module, lists):
        return [block for child in children for block in blocks(child)]
    return [module]


def _is_trunk(module: nn.Module, lists: Sequence[nn.Module]) -> bool:
    """Whether a module is a row of blocks rather than a block: lists, or one child, hold nearly all."""
    total = _size(module)
    biggest = max((_size(c) for c in module.children()), default=0)
    in_lists = sum(_size(c) for c in lists if len(list(c.children())) > 1)
    return biggest > 0.9 * total or in_lists > 0.5 * total


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _last_blocks(backbone: nn.Module, count: int) -> list[nn.Module]:
    found = blocks(backbone)
    if count > len(found):
        raise ConfigError(f"tune.layers: this backbone has {len(found)} blocks, found {count}")
    return found[-count:]


def _inject_lora(model: Model, tune: TuneSection, seed: int) -> None:
    """Put peft's LoRA factors into the backbone (Hu et al. 2021)."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [n for n, m in model.backbone.named_modules() if _takes_lora(m)]
    wanted = [
        n for n in names if tune.targets is None or n.split(".")[-1] in tune.targets or n in tune.targets
    ]
    if not wanted:
        known = ", ".join(sorted({n.split(".")[-1] for n in names}))
        raise ConfigError(
            f"tune.targets: no layer is called {list(tune.targets or ())}, expected some of {known}"
        )
    rank = tune.rank or 8
    config = LoraConfig(r=rank, lora_alpha=tune.alpha or 2 * rank, target_modules=wanted, lora_dropout=0.0)  # type: ignore[arg-type]
    with global_stream(seed, "init", "lora"):
        inject_adapter_in_model(config, model.backbone)
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
