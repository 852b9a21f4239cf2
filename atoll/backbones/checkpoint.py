"""Weights from disk: safetensors, or torch files with `weights_only`; checked before use."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from atoll.backbones.resolve import Backbone, is_run_checkpoint, parent_job, resolve
from atoll.errors import WeightsError
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors


def load_weights(path: Path) -> Tensors:
    """All tensors of a `.safetensors` or a torch file; of a run's model those of its backbone.

    Raises:
        WeightsError: the file is truncated, holds more than tensors, or a value isn't finite.
    """
    tensors = _read(path)
    check_finite(tensors, path)
    if not is_run_checkpoint(path):
        return tensors
    own = {n.removeprefix(IN_RUN): t for n, t in tensors.items() if n.startswith(IN_RUN)}
    if not own or any(".lora_" in name for name in own):
        raise WeightsError(f'{path}: holds no whole backbone, expected a run with tune.method = "full"')
    return own


def _buffers_before(path: Path) -> Tensors:
    """Of a run's model: the tensors of the file that the run began from, with the statistics of batch norms.

    Those no run moves or keeps.
    """
    begun = parent_job(path)
    weights = resolve(begun.backbone, begun.seed).weights if begun is not None else None
    if weights is None or weights.is_dir():  # networks of random weights, or of transformers'
        return {}
    return load_weights(weights)


IN_RUN = "backbone.model."
"""How a run names the tensors of its backbone's network."""


def check_finite(tensors: Tensors, path: Path) -> None:
    """Raises WeightsError for the first tensor with a value that isn't finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: tensor {name} has values that are not finite")


def _read(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file: {error}") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: holds objects other than tensors and was not loaded; expected a state dict"
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: not a readable torch file: {str(error).splitlines()[0]}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(loaded).__name__}")
    return {str(k): v for k, v in state.items()}


def load_state_dict_strict(
    module: nn.Module, state: Tensors, path: Path, *, ignore: tuple[str, ...] = ()
) -> None:
    """Copy a state dict into a module; names and shapes must agree, but for the ignored prefixes.

    Raises:
        WeightsError: a tensor is missing, unexpected, or of another shape.
    """
    own, buffers = module.state_dict(), {name for name, _ in module.named_buffers()}
    given = {k: v for k, v in state.items() if not k.startswith(ignore)} if ignore else dict(state)
    if not buffers & own.keys() <= given.keys():
        given = {n: t for n, t in _buffers_before(path).items() if n in buffers} | given
    for name, tensor in own.items():
        if name not in given:
            if name.endswith("num_batches_tracked") or (is_run_checkpoint(path) and name in buffers):
                given[name] = tensor
                continue
            raise WeightsError(f"{path}: tensor {name} is missing (it has {len(given)} others)")
        if given[name].shape != tensor.shape:
            found, expected = tuple(given[name].shape), tuple(tensor.shape)
            raise WeightsError(f"{path}: tensor {name} has shape {found}, expected {expected}")
    extra = sorted(set(given) - set(own))
    if extra:
        raise WeightsError(f"{path}: unexpected tensor {extra[0]}: weights of another network?")
    module.load_state_dict(given)


def load_transformer(
    backbone: Backbone,
    seed: int,
    kind: str = "AutoModel",
    *,
    config: Any = None,
    fresh: tuple[str, ...] = ("pooler.",),
) -> Any:
    """Any `transformers` network, float32, in eval mode: one without a task's head, or of that kind.

    Random weights come from the job's seed, pretrained ones from the folder that was resolved; those of
    tensors whose names begin with one of `fresh` may be missing there. A `config` is a built-in network's.

    Raises:
        WeightsError: the folder isn't a model's, or lacks tensors that the network needs.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    auto = getattr(transformers, kind)
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
        with global_stream(seed, "init", "backbone"):
            if backbone.weights is None:
                return auto.from_config(config).float().eval()
            network, report = _pretrained(auto, backbone, config)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{backbone.weights or backbone.folder}: transformers cannot load it: {why}"
        ) from None
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(fresh))
    if missing:
        raise WeightsError(f"{backbone.weights}: tensor {missing[0]} is missing ({len(missing)} in all)")
    check_finite(network.state_dict(), backbone.weights)
    vars(network)[_MISSING] = frozenset(report["missing_keys"])
    return network.eval()


_MISSING = "missing_from_weights"


def mark_fresh(network: nn.Module, part: str) -> None:
    """Say that a part of a network that was read has been replaced by a fresh one."""
    names = {f"{part}.{name}" for name, _ in network.get_submodule(part).named_parameters()}
    vars(network)[_MISSING] = vars(network).get(_MISSING, frozenset()) | names


def pretrained_names(network: nn.Module, head: str, backbone: Backbone) -> frozenset[str]:
    """Of the parameters of the part `head`, by their names in it, those that `load_transformer` has read."""
    if backbone.weights is None:
        return frozenset()
    missing = vars(network).get(_MISSING, frozenset())
    part = network.get_submodule(head)
    return frozenset(name for name, _ in part.named_parameters() if f"{head}.{name}" not in missing)


def config_of(backbone: Backbone) -> Any:
    """What a folder of `transformers` says its network is.

    Raises:
        WeightsError: the folder isn't a model's.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise WeightsError(f"{backbone.folder}: transformers cannot load it: {why}") from None


def _pretrained(auto: Any, backbone: Backbone, config: Any) -> Any:
    """(network, loading report), from a folder, or from a file under the folder's config."""
    weights = backbone.weights
    assert weights is not None
    if weights.is_dir():
        return auto.from_pretrained(
            weights, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    with torch.device("meta"):
        network = type(auto.from_config(config))
    return network.from_pretrained(
        None, config=config, state_dict=load_weights(weights), dtype=torch.float32, output_loading_info=True
    )


def force_attention_mask(model: nn.Module) -> None:
    """Let transformers' attention take its mask as it is: to leave out a full one it looks at the values.

    A vectorised map (torch.func) has no values to look at.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    skips = {"allow_is_bidirectional_skip": False, "allow_is_causal_skip": False}

    def whole_mask(*args: Any, **options: Any) -> Any:
        return sdpa_mask(*args, **options | skips)

    AttentionInterface.register("sdpa_whole_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_whole_mask", whole_mask)
    for module in model.modules():
        choose = getattr(module, "set_attn_implementation", None)
        if choose is not None:
            choose("sdpa_whole_mask")
