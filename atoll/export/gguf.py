"""A language model as one GGUF file, which llama.cpp and what is built on it read: weights, words, template.

Nothing is rounded: matrices are written in bfloat16 where every number of the network is one already, else
in float32. Queries and keys are put into the order of rows that llama.cpp turns them in: the two numbers of
each pair one after the other, where transformers has all first ones before all second ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.backbones.converted.gguf_folder import gguf_name, tensors_in
from atoll.backbones.encoder import Model
from atoll.errors import ConfigError
from atoll.export.gguf_vocabulary import add_vocabulary, check_vocabulary
from atoll.export.huggingface import network_of
from atoll.learning.learner import Learner
from atoll.protocol.tensors import Tensors
from atoll.tasks.language_modeling.causal import CausalEncoder
from atoll.tasks.language_modeling.task import LanguageModeling

FILE = "model.gguf"
SUPPORTED = ("llama",)
"""Architectures, as transformers calls them, that are written."""


def check_gguf(learner: Learner) -> None:
    """Raises ConfigError unless the run is of a language model that can be written as it is."""
    if not isinstance(learner.task, LanguageModeling) or learner.backbone.folder is None:
        raise ConfigError(
            f"--format gguf: for language models, not {learner.task.name}; try safetensors or huggingface"
        )
    config = json.loads((learner.backbone.folder / "config.json").read_text("utf-8"))
    if (kind := config.get("model_type")) not in SUPPORTED:
        raise ConfigError(
            f"--format gguf: {learner.job.backbone.name} is of the architecture {kind!r}, expected"
            f" {' or '.join(SUPPORTED)}; try huggingface"
        )
    encoder = learner.encoder
    assert isinstance(encoder, CausalEncoder)
    _check_shape(encoder.model.config)
    check_vocabulary(encoder.tokenizer)


def _check_shape(config: Any) -> None:
    """Raises ConfigError for what a network of that architecture may have and GGUF has no word for."""
    rope = dict(config.rope_parameters or {})
    for key, value, expected in (
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
    ):
        if value != expected:
            raise ConfigError(
                f"--format gguf: the network has {key} = {value!r}, expected {expected!r}; try huggingface"
            )


def write_gguf(model: Model, learner: Learner, folder: Path) -> None:
    """`model.gguf` of a plain model.

    Raises:
        ConfigError: pruning has left layers of different widths.
    """
    from gguf import GGUFWriter

    network, encoder = network_of(model), model.backbone
    assert isinstance(encoder, CausalEncoder)
    config, state = network.config, state_of(network)
    widths = {len(t) for name, t in state.items() if name.endswith("mlp.up_proj.weight")}
    if widths != {config.intermediate_size}:
        raise ConfigError(
            f"--format gguf: layers of {sorted(widths)} units, expected {config.intermediate_size} in each;"
            " try safetensors"
        )
    in_bfloat16 = all(torch.equal(t, t.to(torch.bfloat16).to(t)) for t in state.values())
    writer = GGUFWriter(folder / FILE, "llama")
    _add_shape(writer, config, learner.job.name, in_bfloat16=in_bfloat16)
    add_vocabulary(writer, encoder.tokenizer, config.vocab_size)
    for name, tensor in state.items():
        _add_tensor(writer, name, _rows_in_pairs(name, tensor, config).numpy(), in_bfloat16=in_bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def state_of(network: nn.Module) -> Tensors:
    """The network's weights in float32; without the output layer where that is the embeddings'."""
    state = {name: t.detach().cpu().float() for name, t in network.state_dict().items()}
    if torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        del state["lm_head.weight"]
    return state


def read_gguf(model: Model, folder: Path) -> None:
    """Put the file's numbers back into the model that it was written of."""
    network = network_of(model)
    tensors = tensors_in(folder / FILE)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    network.load_state_dict(tensors)


def _add_shape(writer: Any, config: Any, name: str, *, in_bfloat16: bool) -> None:
    """What llama.cpp must know of the network."""
    from gguf import LlamaFileType

    width = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if in_bfloat16 else LlamaFileType.ALL_F32)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tensor(writer: Any, name: str, values: NDArray[np.float32], *, in_bfloat16: bool) -> None:
    from gguf import GGMLQuantizationType as Kind
    from gguf import quantize

    kind = Kind.BF16 if in_bfloat16 and values.ndim > 1 else Kind.F32
    writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _rows_in_pairs(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp has them for rotary positions, of other weights as they are."""
    heads: Mapping[str, int] = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }
    part = name.split(".")[-2]
    if part not in heads:
        return weight
    halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)
