"""Tasks of two encoders, and of series, on folders of transformers' own networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from atoll.errors import WeightsError
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.backbones.test_backbones import tiny_bert
from tests.support.task_jobs import COMMON, TABLES


def tiny_clip(folder: Path) -> Path:
    """A CLIP of two narrow layers each, with a tokenizer and what its images need."""
    tiny_bert(folder)  # for the tokenizer
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=narrow | {"vocab_size": 500, "max_position_embeddings": 32, "eos_token_id": 3},
        vision_config=narrow | {"image_size": 32, "patch_size": 16},
    )
    for file in folder.glob("*.safetensors"):
        file.unlink()
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def job(task: str, **tables: object) -> Job:
    return Job.parse(COMMON | TABLES[task] | {"name": task} | tables, origin="test")


@pytest.mark.parametrize("method", ["head", "full"])
def test_a_model_of_both_gives_the_encoder_of_images_and_the_one_of_texts(
    tmp_path: Path, method: str
) -> None:
    folder = tiny_clip(tmp_path / "clip")
    backbone = {"name": str(folder), "image_size": 32, "max_tokens": 16}
    setting = job("image-text", backbone=backbone, tune={"method": method})
    result = simulate(setting, tmp_path / "out", on_event=ignore_events, report=False)
    assert result.rounds[-1]["loss"] < result.rounds[0]["loss"]


def test_a_network_of_images_alone_asks_for_one_of_texts(tmp_path: Path) -> None:
    setting = job("image-text", backbone={"name": "torchvision:squeezenet1_1", "weights": "random"})
    with pytest.raises(WeightsError, match=r"backbone\.options\.text: missing"):
        simulate(setting, tmp_path / "out", on_event=ignore_events, report=False)


@pytest.mark.parametrize("method", ["head", "last-k", "lora", "full"])
def test_series_are_read_by_transformers_own_networks(tmp_path: Path, method: str) -> None:
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=14, patch_length=4, patch_stride=2, d_model=16, ffn_dim=16,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    transformers.PatchTSTModel(config).save_pretrained(tmp_path / "patches")
    tune = {"method": method} | ({"layers": 1} if method == "last-k" else {})
    backbone = {"name": str(tmp_path / "patches")}
    result = simulate(
        job("forecasting", backbone=backbone, tune=tune),
        tmp_path / "out",
        on_event=ignore_events,
        report=False,
    )
    assert result.rounds[-1]["loss"] < result.rounds[0]["loss"]


def test_a_network_of_other_windows_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=20, d_model=8, num_attention_heads=2
    )
    transformers.PatchTSTModel(config).save_pretrained(tmp_path / "patches")
    with pytest.raises(WeightsError, match="reads 20 steps of 3 columns, the job has 14 of 3"):
        simulate(
            job("forecasting", backbone={"name": str(tmp_path / "patches")}),
            tmp_path / "o",
            on_event=ignore_events,
            report=False,
        )
