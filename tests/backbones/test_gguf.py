"""GGUF files become folders of transformers: the same numbers as transformers' own reader makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from atoll.backbones.converted.gguf_folder import causal_folder, write_folder
from atoll.backbones.resolve import PACKAGED
from atoll.downloads.pypi import PACKAGES
from atoll.errors import WeightsError

WIDTH, HEADS, KEY_HEADS, BLOCKS = 64, 4, 2, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "attn_v": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (96, WIDTH),
    "ffn_up": (96, WIDTH),
    "ffn_down": (WIDTH, 96),
}
LETTERS = [chr(code) for code in range(33, 127)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġ", "Ċ", "he", "ĠĠ", "Ġhe"]
MERGES = ["h e", "Ġ Ġ", "Ġ he"]


def gguf_file(path: Path, *, architecture: str = "llama", split: str = "smollm", tied: bool = True) -> Path:
    """A network of two blocks with random weights: tables in 8 bits, matrices in 4, norms whole."""
    draw = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, values: Any, kind: Kind) -> None:
        stored = gguf.quantize(values.astype(np.float32), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)

    add("token_embd.weight", draw.normal(size=(len(TOKENS), WIDTH)), Kind.Q8_0)
    add("output_norm.weight", draw.normal(size=WIDTH), Kind.F32)
    if not tied:
        add("output.weight", draw.normal(size=(len(TOKENS), WIDTH)), Kind.Q8_0)
    for block in range(BLOCKS):
        for part, shape in SHAPES.items():
            add(f"blk.{block}.{part}.weight", draw.normal(size=shape) / 8, Kind.Q4_1)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{part}.weight", draw.normal(size=WIDTH), Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_holds_what_transformers_reads_from_the_file(tmp_path: Path, tied: bool) -> None:
    file = gguf_file(tmp_path / "a.gguf", tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    (tmp_path / "folder").mkdir()
    write_folder(file, tmp_path / "folder")
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    given = torch.tensor([[1, 7, 40, 9, 12]])
    assert torch.equal(ours.eval()(given).logits, theirs.eval()(given).logits)


def test_the_tokenizer_sets_digits_apart_as_smollms_does(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_folder(gguf_file(tmp_path / "a.gguf"), tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "he  12 he<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ĠĠ", "1", "2", "Ġhe", "<|im_end|>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"architecture": "gpt2"}, "a network of kind gpt2, expected llama"),
        ({"split": "qwen2"}, "a tokenizer of kind qwen2, expected smollm"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    gguf_file(package / "a.gguf", **changed)
    with pytest.raises(WeightsError, match=told) as error:
        causal_folder(package)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["package"]


def test_a_damaged_file_is_refused_and_a_whole_one_converted_once(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    whole = gguf_file(package / "a.gguf").read_bytes()
    (package / "a.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"a\.gguf"):
        causal_folder(package)
    (package / "a.gguf").write_bytes(whole)
    folder = causal_folder(package)
    assert json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"] == BLOCKS
    (package / "a.gguf").unlink()
    assert causal_folder(package) == folder


def test_the_packaged_chat_model_says_its_licence_and_that_its_weights_had_four_bits() -> None:
    from atoll.cli.listing import backbones

    package, _ = PACKAGED["hf:SmolLM2-135M-Instruct"]
    assert PACKAGES[package].licence == "Apache-2.0"
    told = {name: what for name, what, _ in backbones()}["hf:SmolLM2-135M-Instruct"]
    assert "4-bit weights, dequantised" in told and "Apache-2.0" in told
