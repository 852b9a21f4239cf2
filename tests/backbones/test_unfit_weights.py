"""Weights and folders that can't be a network's are refused in one line; floats of any precision are read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.resolve import resolve
from atoll.backbones.small_tokenizer import own_tokenizer
from atoll.backbones.text import load_text_encoder
from atoll.errors import WeightsError
from atoll.job.job import BackboneSection

TENSOR = "encoder.layer.0.output.dense.weight"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT of one layer, with a tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    own_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    section = BackboneSection(name=str(folder))
    return load_text_encoder(resolve(section, 0), section, 0)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_a_folder_whose_weights_are_no_floats_is_refused_by_the_tensors_name(
    bert: Path, prefix: str, kind: torch.dtype
) -> None:
    weights = load_file(bert / "model.safetensors")
    weights[TENSOR] = weights[TENSOR].to(kind)
    named = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    save_file(named, bert / "model.safetensors", {"format": "pt"})
    said = rf"tensor {prefix}{TENSOR} holds {str(kind).removeprefix('torch.')}, expected float32"
    with pytest.raises(WeightsError, match=said):
        loaded(bert)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_floats_of_half_the_precision_are_read_and_noted(
    bert: Path, kind: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(bert / "model.safetensors")
    half = {name: tensor.to(kind) for name, tensor in weights.items()}
    save_file(half, bert / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO, logger="atoll"):
        found = loaded(bert).model.state_dict()[TENSOR]
    assert found.dtype == torch.float32 and torch.equal(found, half[TENSOR].float())
    assert f"{str(kind).removeprefix('torch.')} as float32" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("num_attention_heads", 0, "modulo by zero"), ("num_attention_heads", "x", "num_attention_heads")],
)
def test_a_config_of_which_no_network_can_be_built_is_one_line(
    bert: Path, key: str, value: Any, said: str
) -> None:
    config = json.loads((bert / "config.json").read_text("utf-8"))
    (bert / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(WeightsError, match=said) as refused:
        loaded(bert)
    assert str(bert) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_the_files_of_its_tokenizer_is_refused(bert: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer's file.*expected one of tokenizer\.json, vocab"):
        loaded(bert)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}, unk_token="[UNK]"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0)], None),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_tokenizer_that_would_stop_at_an_unknown_word_is_refused(bert: Path, model: Any) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="a").save_pretrained(bert)
    with pytest.raises(WeightsError, match=r"no token for a word .*expected an unk_token") as refused:
        loaded(bert)
    assert str(bert) in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_that_drops_what_it_does_not_know_is_remarked(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded(bert)
    assert "drops" not in caplog.text
    bytes_of = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_of, pad_token="a").save_pretrained(bert)
    loaded(bert)
    assert "drops" not in caplog.text
    few = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=few, pad_token="a").save_pretrained(bert)
    loaded(bert)
    assert f"{bert}: its tokenizer drops what it doesn't know" in caplog.text


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"ab"])
def test_an_empty_file_and_one_of_two_bytes_are_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path.name}: not a readable") as refused:
        load_weights(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.bool])
def test_a_file_whose_weights_are_no_floats_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    path, network = tmp_path / "weights.pth", nn.Linear(2, 2)
    torch.save(network.state_dict() | {"bias": torch.zeros(2, dtype=kind)}, path)
    with pytest.raises(WeightsError, match=f"tensor bias holds {str(kind).removeprefix('torch.')}"):
        load_state_dict_strict(network, load_weights(path), path)
    half = {"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.ones(2, dtype=torch.bfloat16)}
    load_state_dict_strict(network, half, path)
    assert network.weight.dtype == torch.float32 and bool((network.weight == 1).all())
