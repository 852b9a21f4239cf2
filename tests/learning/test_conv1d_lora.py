"""LoRA of GPT-2, whose linear layers are transformers' Conv1D: weights that lie the other way round."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.tasks import task_named
from tests.support.models import byte_tokenizer


def small_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers, with a tokenizer of bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


def test_factors_add_their_product_to_a_layer_that_lies_the_other_way_round(tmp_path: Path) -> None:
    """x W + b + (alpha / rank) x A^T B^T, where W is [in, out] (Hu et al. 2021)."""
    job = Job.parse(
        {
            "name": "gpt2",
            "seed": 3,
            "task": {"name": "language-modeling", "options": {"max_tokens": 16}},
            "data": {"source": "generated-questions"},
            "backbone": {"name": str(small_gpt2(tmp_path / "gpt2"))},
            "tune": {"method": "lora", "rank": 2, "alpha": 6.0},
            "federation": {"clients": 2, "rounds": 1},
        },
        origin="test",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Learner.of(job, task_named("language-modeling"), {}).model
    layers = {name: m for name, m in model.backbone.named_modules() if hasattr(m, "lora_A")}
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"c_attn", "c_proj", "c_fc"} and len(layers) == 8
    for layer in layers.values():
        base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        x = torch.randn(3, base.weight.shape[0])
        expected = x @ base.weight + base.bias + 6.0 / 2 * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), expected)
