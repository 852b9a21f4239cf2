"""GGUF files of Llama's shape, written as the folder of a network and a tokenizer that transformers reads.

transformers reads such files too, in a minute and a half, and its tokenizer then doesn't split digits as
SmolLM's does. Here the `gguf` package turns the blocks of 4 or 8 bits back into float32, and the names are
mapped: queries and keys, whose rows llama.cpp keeps in another order, included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from atoll.errors import WeightsError
from atoll.protocol.tensors import Tensors
from atoll.system.cache import cached_folder

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS_BACK = {ours: theirs for theirs, ours in _PARTS.items()}
_OUTSIDE_BACK = {ours: theirs for theirs, ours in _OUTSIDE.items()}
_SPECIAL_TYPE = 3
_SPLITS_DIGITS = "smollm"
"""The only way of splitting a text before its pieces are looked up that is known here."""


def causal_folder(package: Path) -> Path:
    """A folder of transformers' with what the one GGUF file in `package` holds, made once beside it.

    Raises:
        WeightsError: the file is damaged, or of another network.
    """

    def fill(staging: Path) -> None:
        (file,) = package.glob("*.gguf")
        try:
            write_folder(file, staging)
        except KeyError as error:
            raise WeightsError(f"{file}: {error} is missing") from None
        except ValueError as error:
            raise WeightsError(f"{file}: not as expected: {str(error).splitlines()[0]}") from None

    return cached_folder(package.with_name(f"{package.name}-float32"), fill)


def write_folder(file: Path, folder: Path) -> None:
    """`model.safetensors` in float32, `config.json` and the tokenizer's files.

    Raises:
        ValueError: the network isn't Llama's, or its tokenizer isn't SmolLM's. KeyError: a part is missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"a network of kind {metadata['general.architecture']}, expected llama")
    tensors = _tensors(reader, metadata)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = _config(metadata, is_tied="lm_head.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _tokenizer(metadata).save_pretrained(folder)


def tensors_in(file: Path) -> Tensors:
    """All tensors of a file of Llama's shape, in float32 under transformers' names."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    return _tensors(reader, {name: field.contents() for name, field in reader.fields.items()})


def _tensors(reader: Any, metadata: dict[str, Any]) -> Tensors:
    """All tensors in float32 under transformers' names."""
    from gguf import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors: Tensors = {}
    for stored in reader.tensors:
        values = np.array(dequantize(stored.data, stored.tensor_type), np.float32)
        part = stored.name.split(".")[-2]
        if part in heads:
            values = _rows_in_halves(values, heads[part])
        tensors[_name(stored.name)] = torch.from_numpy(values)
    return tensors


def _name(theirs: str) -> str:
    if theirs in _OUTSIDE:
        return _OUTSIDE[theirs]
    _, number, part, kind = theirs.split(".")
    return f"model.layers.{number}.{_PARTS[part]}.{kind}"


def gguf_name(ours: str) -> str:
    """What the file calls a tensor of transformers'.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight"), gguf_name("lm_head.weight")
    ('blk.3.attn_q.weight', 'output.weight')
    """
    if (theirs := _OUTSIDE_BACK.get(ours)) is not None:
        return theirs
    number, part = ours.removeprefix("model.layers.").split(".", 1)
    part, _, kind = part.rpartition(".")
    return f"blk.{number}.{_PARTS_BACK[part]}.{kind}"


def _rows_in_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Each head's rows as transformers has them for rotary positions: first halves of pairs, then second.

    >>> _rows_in_halves(np.arange(4, dtype=np.float32)[:, None], heads=1).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _config(metadata: dict[str, Any], *, is_tied: bool) -> dict[str, object]:
    """What transformers must know of the network."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": is_tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer(metadata: dict[str, Any]) -> Any:
    """Byte pairs (GPT-2's) after each digit has been set apart, with the model's own template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if metadata["tokenizer.ggml.pre"] != _SPLITS_DIGITS:
        raise ValueError(f"a tokenizer of kind {metadata['tokenizer.ggml.pre']}, expected {_SPLITS_DIGITS}")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    pieces = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pieces.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL_TYPE]
    pieces.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=pieces,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
