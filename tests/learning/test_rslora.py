"""Rank-stabilised LoRA: its scaling, every way of merging, and adapters that stock peft reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import ConfigError
from atoll.export.huggingface import write_folder
from atoll.learning.learner import Learner
from atoll.learning.lora_base import lora_layers, merging_lora
from atoll.strategies.fedavg import FedAvg
from atoll.strategies.lora.merge import ADDS_TO_BASE, LoraMerge
from atoll.tasks import task_named
from atoll.trained import trained
from tests.strategies.test_lora_merge import ALL, EXACT, a_job, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rslora")


def learner_of(folder: Path, **tune: Any) -> Learner:
    job = a_job(folder, None, tune=tune)
    return Learner.of(job, task_named(job.task.name), {"classes": ["good", "bad"]})


@pytest.mark.parametrize(
    ("tune", "scaling"),
    [
        ({"rank": 5, "alpha": 3.0, "rslora": True}, 3 / math.sqrt(5)),
        ({"rank": 5, "rslora": True}, 16 / math.sqrt(5)),
        ({"rank": 5, "alpha": 3.0}, 3 / 5),
        ({"rank": 5}, 2.0),
    ],
)
def test_factors_are_scaled_over_the_root_of_the_rank(
    tune: dict[str, Any], scaling: float, folder: Path
) -> None:
    learner = learner_of(folder, **tune)
    merge = merging_lora(FedAvg(), learner)
    assert isinstance(merge, LoraMerge) and len(merge.scalings) > 1
    assert list(merge.scalings.values()) == pytest.approx([scaling] * len(merge.scalings))
    _, layer = next(lora_layers(learner.model))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        x = torch.randn(3, layer.lora_A["default"].in_features)
        added = layer(x) - layer.get_base_layer()(x)
        b, a = (factor["default"].weight for factor in (layer.lora_B, layer.lora_A))
        torch.testing.assert_close(added, scaling * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ALL[1:])
def test_every_merge_uses_the_scaling_and_stock_peft_reads_the_same_network(
    method: str, folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    ranks = {"lora_ranks": {"client-1": 1}} if method == "flexlora" else {}
    tune = {"rank": 3, "alpha": 2.5, "rslora": True} | ranks
    job = a_job(folder, method, tune=tune, federation={"rounds": 1})
    [line] = run(job, tmp_path / "run").rounds
    errors = [layer["relative"] for layer in line["aggregation_error"]["layers"].values()]
    assert max(errors) <= 1e-6 or method not in EXACT

    learner, tensors = trained(tmp_path / "run")
    model = learner.filled(tensors)
    batch = model.backbone.preprocess_and_collate(["good a b", "bad bad c d"])
    (tmp_path / "out").mkdir()
    write_folder(model, learner.job, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config.get("use_rslora", False) == (method not in ADDS_TO_BASE)
    with torch.inference_mode():
        expected = model.backbone.model(**batch).last_hidden_state.clone()
        base = AutoModel.from_pretrained(learner.job.backbone.name).eval()
        before = base(**batch).last_hidden_state.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        assert torch.allclose(adapted(**batch).last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_it_has_no_meaning_without_lora(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.rslora has no meaning with method = 'full', only"):
        a_job(folder, None, tune={"method": "full", "rank": None, "rslora": True})
