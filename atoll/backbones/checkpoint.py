"""Weights from disk: safetensors, or torch files with `weights_only`; checked before use."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from atoll.backbones.resolve import Backbone, is_run_checkpoint, parent_job, resolve, weight_files
from atoll.errors import WeightsError
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

logger = logging.getLogger(__name__)


def load_weights(path: Path) -> Tensors:
    """All tensors of a `.safetensors` or a torch file; of a run's model those of its backbone.

    Raises:
        WeightsError: the file is truncated, holds more than tensors, or a value isn't finite.
    """
    tensors = _read(path)
    check_finite(tensors, path)
    if not is_run_checkpoint(path):
        return tensors
    in_run = {n.removeprefix(IN_RUN): t for n, t in tensors.items() if n.startswith(IN_RUN)}
    if not in_run or any(".lora_" in name for name in in_run):
        raise WeightsError(f'{path}: holds no whole backbone, expected a run with tune.method = "full"')
    return in_run


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


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]


def check_types(
    stored: Mapping[str, torch.dtype], expected_types: Mapping[str, torch.dtype], path: Path
) -> None:
    """See whether tensors of a file can be a network's without a change of what their numbers mean.

    Floats become floats of another precision, which is noted in the log; all else is as it is.

    Raises:
        WeightsError: a tensor is of another kind: whole numbers, complex ones.
    """
    converted = set()
    for name in stored.keys() & expected_types.keys():
        stored_type, expected = stored[name], expected_types[name]
        if stored_type == expected:
            continue
        if not (stored_type.is_floating_point and expected.is_floating_point):
            raise WeightsError(
                f"{path}: tensor {name} holds {_plain(stored_type)}, expected {_plain(expected)}"
                + (" or other floats" if expected.is_floating_point else "")
            )
        converted.add(f"{_plain(stored_type)} as {_plain(expected)}")
    if converted:
        logger.info("%s: read %s", path, ", ".join(sorted(converted)))


def _plain(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _types_in(weights: Path) -> dict[str, torch.dtype]:
    """The types of the tensors in safetensors, a file or a folder; torch files aren't looked at."""
    files = weight_files(weights) if weights.is_dir() else [weights]
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    kind = opened.get_slice(name).get_dtype()
                    dtypes[name] = _SAFETENSORS.get(kind, torch.float32)
    return dtypes


_SAFETENSORS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "C64": torch.complex64,
}  # fmt: skip
"""What safetensors calls types; others are floats of 8 bits and less."""


def _check_transformer_types(network: nn.Module, weights: Path) -> None:
    """As `check_types`; files may name tensors with the network's kind in front, or without."""
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    known = dtypes | {f"{prefix}{n}": t for n, t in dtypes.items()}
    known |= {n.removeprefix(prefix): t for n, t in dtypes.items()}
    check_types(_types_in(weights), known, weights)


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
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, LookupError) as error:
        raise WeightsError(f"{path}: not a readable torch file: {first_line(error)}") from None
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
    state_of_module, buffers = module.state_dict(), {name for name, _ in module.named_buffers()}
    stored = {k: v for k, v in state.items() if not k.startswith(ignore)} if ignore else dict(state)
    if not buffers & state_of_module.keys() <= stored.keys():
        stored = {n: t for n, t in _buffers_before(path).items() if n in buffers} | stored
    for name, tensor in state_of_module.items():
        if name not in stored:
            if name.endswith("num_batches_tracked") or (is_run_checkpoint(path) and name in buffers):
                stored[name] = tensor
                continue
            raise WeightsError(f"{path}: tensor {name} is missing (it has {len(stored)} others)")
        if stored[name].shape != tensor.shape:
            shape, expected = tuple(stored[name].shape), tuple(tensor.shape)
            raise WeightsError(f"{path}: tensor {name} has shape {shape}, expected {expected}")
    extra = sorted(set(stored) - set(state_of_module))
    if extra:
        raise WeightsError(f"{path}: unexpected tensor {extra[0]}: weights of another network?")
    check_types(
        {n: t.dtype for n, t in stored.items()}, {n: t.dtype for n, t in state_of_module.items()}, path
    )
    module.load_state_dict(stored)


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
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    auto = getattr(transformers, kind)
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
        with global_stream(seed, "init", "backbone"):
            if backbone.weights is None:
                return auto.from_config(config).float().eval()
            network, report = _pretrained(auto, backbone, config)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{backbone.weights or backbone.folder}: transformers cannot load it: {first_line(error)}"
        ) from None
    except (ArithmeticError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        raise WeightsError(
            f"{backbone.folder}/config.json: no network can be built of it: {first_line(error)}"
        ) from None
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(fresh))
    if missing:
        raise WeightsError(f"{backbone.weights}: tensor {missing[0]} is missing ({len(missing)} in all)")
    check_finite(network.state_dict(), backbone.weights)
    _check_transformer_types(network, backbone.weights)
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ArithmeticError, TypeError, StrictDataclassError) as error:
        raise WeightsError(f"{backbone.folder}: transformers cannot load it: {first_line(error)}") from None


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
    _choose_attention(model, "sdpa_whole_mask")


def attention_of(network: nn.Module) -> str | None:
    """The name of transformers' way to compute attention that a network is set to, if it has any."""
    implementation: str | None = getattr(getattr(network, "config", None), "_attn_implementation", None)
    return implementation


@contextmanager
def attention(network: nn.Module, name: str | None) -> Iterator[None]:
    """Within, a network computes attention in the way of that name."""
    before = attention_of(network)
    if name is None or name == before:
        yield
        return
    _choose_attention(network, name)
    try:
        yield
    finally:
        _choose_attention(network, str(before))


def _choose_attention(model: nn.Module, name: str) -> None:
    for module in model.modules():
        choose = getattr(module, "set_attn_implementation", None)
        if choose is not None:
            choose(name)
