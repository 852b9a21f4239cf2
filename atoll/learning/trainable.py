"""The tensors that are trained and sent: head, last blocks, LoRA factors, all, or direction coefficients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from atoll.backbones.encoder import Model
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.tune import TuneSection
from atoll.learning import directions, lora_base
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors, aligned
from atoll.strategies.lora.factors import CORE
from atoll.strategies.lora.merge import ADDS_TO_BASE

BatchNorms = (nn.modules.batchnorm._BatchNorm,)
Norms = (*BatchNorms, nn.LayerNorm, nn.GroupNorm)


def prepare(model: Model, job: Job) -> None:
    """Set up a new network for training and evaluation as the job says.

    Raises:
        ConfigError: it lacks what the job names, such as layers to train or dropout layers.
    """
    mark_trainable(model, job.tune, job.seed, keeps_head=job.personal.keep == "head")
    for parameter in trainable(model).values():
        parameter.data = aligned(parameter.data)  # what is frozen stays mapped, one copy for all processes
    model.remember_start()
    if job.tune.method == "seeds":
        directions.hold(model, job.seed, job.tune.num_seeds)
    if job.train.dropout is not None:
        set_dropout(model, job.train.dropout)
    if job.train.checkpoint_activations:
        recomputable(model)


def mark_trainable(model: Model, tune: TuneSection, seed: int, *, keeps_head: bool = False) -> None:
    """Set `requires_grad` on exactly the parameters that the job trains.

    The head is trained too, except a pretrained one under LoRA. Where clients keep their heads
    (`keeps_head`), it is also trained then, unless the job says otherwise.

    Raises:
        ConfigError: nothing matches `tune.targets`, or there are fewer blocks than `tune.layers`.
    """
    model.requires_grad_(False)
    match tune.method:
        case "last-k":
            for module in _last_blocks(model.backbone.model, tune.layers or 1, model.head):
                module.requires_grad_(True)
        case "lora":
            _tune_by_lora(model, tune, seed, keeps_head)
            return
        case "full" | "seeds":
            model.requires_grad_(True)
    if model.tunes_head:
        model.head.requires_grad_(True)


def _tune_by_lora(model: Model, tune: TuneSection, seed: int, keeps_head: bool) -> None:
    """Add LoRA factors to the backbone; by default a new head is trained and a pretrained one frozen.

    If only some layers of a pretrained head are new (for other classes, say), these are trained. `tune.head`
    overrides the default, also for a head that is new as a whole.
    """
    how = tune.head or ("frozen" if model.pretrained_head and not keeps_head else "trained")
    known = dict(model.head.named_parameters())
    settled = model.pretrained_head or frozenset(known)
    fresh = [p for name, p in known.items() if how == "trained" or name not in settled]
    of_head = dict(model.head.named_modules())
    adapted = {
        id(module)
        for place, module in of_head.items()
        if how == "lora" and f"{place}.weight".removeprefix(".") in settled
    }
    left_out = {id(module) for module in of_head.values()} - adapted
    if adapted and not any(module is model.head for module in model.backbone.modules()):
        raise ConfigError(
            "tune.head: this head is a layer on top of the backbone, expected 'trained' or 'frozen',"
            " found 'lora'"
        )
    _inject_lora(model, tune, seed, left_out)
    for parameter in fresh:
        parameter.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; they are what is sent and hashed."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> Tensors:
    """Copies of the trained parameters' values by name, contiguous in memory."""
    return {name: contiguous(p.detach()) for name, p in trainable(model).items()}


def contiguous(values: torch.Tensor) -> torch.Tensor:
    """A copy that is contiguous in memory, whatever the layout (channels last, say) of the original."""
    return values.clone(memory_format=torch.contiguous_format)


def load_values(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the trained parameters of the same names; pruned weights stay zero.

    LoRA's other tensors are loaded too: factors that this round does not train, and additions to frozen
    weights. Where direction coefficients are trained, all weights are set according to them.
    """
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(tensors[name])
        lora_base.load(model, tensors)
        directions.load(model)
    keep_pruned(model)


PRUNING_MASK = "kept_weights"
"""The attribute of a pruned layer with its mask: 1 where a weight remains, 0 where it was pruned."""


def keep_pruned(model: nn.Module) -> None:
    """Set pruned weights to zero again, after a step or noise has changed them."""
    with torch.no_grad():
        for module in model.modules():
            mask = vars(module).get(PRUNING_MASK)
            if mask is not None:
                module.weight.mul_(mask.to(module.weight))  # type: ignore[operator]


def without_pruned(model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors with zeros where the model's weights were pruned."""
    pruned = dict(tensors)
    for name, module in model.named_modules():
        mask = vars(module).get(PRUNING_MASK)
        if mask is not None and f"{name}.weight" in pruned:
            pruned[f"{name}.weight"] = pruned[f"{name}.weight"] * mask.to(pruned[f"{name}.weight"])
    return pruned


def to_parameters(parameters: Mapping[str, nn.Parameter], tensors: Tensors) -> Tensors:
    """The tensors on the device and in the dtype of the parameters; copied only where these differ."""
    return {name: tensors[name].to(p.device, p.dtype) for name, p in parameters.items()}


def delta(parameters: Mapping[str, nn.Parameter], start: Tensors) -> Tensors:
    """The parameters' values minus `start`, by name, contiguous in memory."""
    return {name: (p.detach() - start[name]).contiguous().cpu() for name, p in parameters.items()}


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer; those in frozen parts stay inactive.

    Raises:
        ConfigError: there is no dropout layer in a trained part.
    """
    training_mode(model)
    layers = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if not any(layer.training for layer in layers):
        raise ConfigError("train.dropout: no layer of dropout is where this job tunes, expected none")
    for layer in layers:
        layer.p = probability


def training_mode(module: nn.Module, inherited: bool = True) -> None:
    """Set training mode: dropout is active in trained parts only, and batch-norm statistics never change."""
    first = next(module.parameters(), None)
    tuned = inherited if first is None else any(p.requires_grad for p in module.parameters())
    if not tuned:
        for part in module.modules():
            part.training = False
        return
    module.training = not isinstance(module, BatchNorms)
    for child in module.children():
        training_mode(child, module.training)


CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(network: nn.Module, head: nn.Module | None = None) -> list[nn.Module]:
    """The network's blocks from input to output: transformer layers, residual units and the like.

    Blocks are the elements of containers (`nn.Sequential`, `nn.ModuleList`) that are no containers
    themselves; modules that mainly wrap a container are opened too. A `head` inside the network is no block.
    Parameters that two blocks share (embeddings of encoder and decoder) belong to the first.
    """
    parts = [child for child in network.children() if child is not head and _size(child)]
    if head is not None and len(parts) == 1 < len(list(network.children())):
        parts = list(parts[0].children())
    in_order: list[nn.Module] = []
    seen: set[int] = set()
    for block in (block for part in parts for block in _opened(part)):
        new = {id(p) for p in block.parameters()} - seen
        if new and block is not head:
            in_order.append(block)
            seen |= new
    return in_order


def recomputable(model: Model) -> list[nn.Module]:
    """The blocks for activation checkpointing: those of the backbone, or of each of its networks.

    Raises:
        ConfigError: the backbone has fewer than two blocks.
    """
    network = model.backbone.model
    networks = list(network.children()) if isinstance(network, nn.ModuleDict) else [network]
    all_blocks = [block for each in networks for block in blocks(each, model.head)]
    if len(all_blocks) < 2:
        raise ConfigError("train.checkpoint_activations: this backbone has no blocks, expected false")
    return all_blocks


def _opened(module: nn.Module, listed: bool = False) -> list[nn.Module]:
    is_container = _contains(module)
    if not is_container and (listed or not _wraps_a_container(module)):
        return [module]
    return [block for child in module.children() for block in _opened(child, listed=is_container)]


def _contains(module: nn.Module) -> bool:
    # torchvision puts a classifier's layers in the latter, for those who take what comes out on the way.
    return type(module) in CONTAINERS or type(module).__name__ == "IntermediateLayerGetter"


def _wraps_a_container(module: nn.Module) -> bool:
    inner = [child for child in module.children() if _contains(child)]
    tables = [child for child in module.children() if isinstance(child, nn.Embedding)]
    return len(inner) == 1 and _size(inner[0]) > 0.8 * (_size(module) - sum(map(_size, tables)))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, transformers' own classes included."""
    is_leaf = next(module.children(), None) is None
    return isinstance(module, Norms) or (is_leaf and type(module).__name__.endswith("Norm"))


def _last_blocks(network: nn.Module, count: int, head: nn.Module) -> list[nn.Module]:
    """The last `count` blocks; a normalisation layer by itself belongs to the block before it."""
    is_inside = any(module is head for module in network.modules())
    parts = set(head.modules())
    body = [block for block in blocks(network, head if is_inside else None) if block not in parts]
    starts = [place for place, block in enumerate(body) if not is_norm(block)]
    if count > len(starts):
        raise ConfigError(f"tune.layers: this backbone has {len(starts)} blocks, found {count}")
    return body[starts[-count] :]


def _inject_lora(model: Model, tune: TuneSection, seed: int, left_out: set[int]) -> None:
    """Add peft's LoRA factors to the backbone (Hu et al. 2021) or its last blocks, but not to `left_out` ids.

    With `freeze_a` or `lora_merge = "ffa"` only B is trained (`strategies/lora/ffa.py`). A is drawn from
    the job's seed, the same everywhere. With "fedsb" both come from the weights (`strategies/lora/fedsb.py`).
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Conv2d as LoraConv2d

    where = model.backbone.modules() if tune.layers is None else _within_last_blocks(model, tune.layers)
    there = {id(module) for module in (*where, *model.head.modules())} - left_out
    names = [n for n, m in model.backbone.named_modules() if _takes_lora(m) and id(m) in there]
    if not names:
        raise ConfigError("tune.method: this backbone has no layer for LoRA, expected head, last-k or full")
    wanted = [
        n for n in names if tune.targets is None or n.split(".")[-1] in tune.targets or n in tune.targets
    ]
    if not wanted:
        known = ", ".join(sorted({n.split(".")[-1] for n in names}))
        raise ConfigError(
            f"tune.targets: no layer is called {list(tune.targets or ())}, expected some of {known}"
        )
    config = LoraConfig(
        r=tune.default_rank, lora_alpha=tune.lora_alpha, use_rslora=tune.rslora, target_modules=wanted,  # type: ignore[arg-type]
        lora_dropout=0.0,
    )  # fmt: skip
    with global_stream(seed, "init", "lora"), warnings.catch_warnings():
        # It tells of each Conv1D that it takes the weight the other way round, as it has to.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        inject_adapter_in_model(config, model.backbone)
    for module in model.backbone.modules():
        if isinstance(module, LoraConv2d):
            for factor in module.lora_A.values():
                _convolve_like(factor, module.get_base_layer())
    if tune.lora_merge == "fedsb":
        lora_base.fix_factors(model.backbone)
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(_is_tuned(name, tune))
    if tune.lora_merge in ADDS_TO_BASE:
        lora_base.hold(model)


def _is_tuned(name: str, tune: TuneSection) -> bool:
    """Whether LoRA trains a parameter of the backbone."""
    if tune.lora_merge == "fedsb":
        return name.endswith(CORE)
    return "lora_B" in name or ("lora_" in name and tune.trains_a)


def _within_last_blocks(model: Model, count: int) -> Iterator[nn.Module]:
    for block in _last_blocks(model.backbone.model, count, model.head):
        yield from block.modules()


def _convolve_like(factor: nn.Module, base: nn.Module) -> None:
    """Give a convolution's A the dilation of its layer, since peft copies only stride and padding.

    B is a 1 x 1 convolution, so the product of both that is added to the layer's weight stays the same.
    """
    assert isinstance(factor, nn.Conv2d) and isinstance(base, nn.Conv2d)
    factor.dilation = base.dilation
    factor.padding_mode = base.padding_mode
    factor._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice


def _takes_lora(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        # torch's attention takes this layer's weight and never calls it: factors would do nothing.
        return False
    return (
        isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1)
        or _is_gpt2s(module)
    )


def _is_gpt2s(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
