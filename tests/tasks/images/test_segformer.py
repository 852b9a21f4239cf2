"""SegFormer folders in segmentation: the scores transformers says, every way of tuning, other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.errors import ConfigError, WeightsError
from atoll.learning.learner import Learner
from tests.support.models import small_wav2vec2
from tests.tasks.images.test_segmentation import job, pair, prepared


def small_segformer(folder: Path, *, classes: int = 2, kind: str = "ForSemanticSegmentation") -> Path:
    """A SegFormer of two scales, with means and deviations of its own."""
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"Segformer{kind}")(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


def prepared_on(folder: Path, method: str = "full", **backbone: Any) -> tuple[Learner, Shard]:
    return prepared(job(method, backbone={"name": str(folder), "image_size": 32} | backbone))


def test_scores_and_scaling_are_those_of_transformers(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = small_segformer(tmp_path / "m")
    learner, _ = prepared_on(folder)
    image = pair(3, side=32)[0]
    batch = learner.encoder.preprocess_and_collate([image])
    processor = SegformerImageProcessor.from_pretrained(folder)
    wanted = processor(Image.open(BytesIO(image)), do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(batch["pixel_values"], wanted, atol=1e-5)
    theirs = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = learner.model.eval()(batch)
        logits = theirs(pixel_values=wanted).logits
        masks = processor.post_process_semantic_segmentation(theirs(pixel_values=wanted), [(32, 32)])
    assert logits.shape == (1, 2, 8, 8) and scores.shape == (1, 2, 32, 32)
    # Pixel 4i + 1 lies 3/8 of the way from the centre before (of 4i - 2.5) to that of score i (of 4i + 1.5).
    between = logits[:, :, 1:, 1:] * 0.875 * 0.875 + logits[:, :, :-1, :-1] * 0.125 * 0.125
    between += (logits[:, :, 1:, :-1] + logits[:, :, :-1, 1:]) * 0.875 * 0.125
    assert torch.allclose(scores[:, :, 5::4, 5::4], between, atol=1e-5)
    assert torch.equal(learner.model.predict(batch)[0], masks[0])


@pytest.mark.parametrize("method", ["head", "last-k", "lora", "full"])
def test_every_way_of_tuning_moves_the_head_and_what_it_says(tmp_path: Path, method: str) -> None:
    folder = small_segformer(tmp_path / "m")
    learner, shard = prepared(
        job(
            backbone={"name": str(folder), "image_size": 32},
            tune={"method": method} | ({"layers": 1} if method == "last-k" else {}),
        )
    )
    before = learner.initial()
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    in_head = {name for name in update.delta if ".decode_head." in name}
    if method == "lora":  # the head came with the weights, for as many classes
        assert not in_head
    else:
        names = {f"backbone.model.decode_head.{n}" for n, _ in learner.model.head.named_parameters()}
        assert in_head == names
        assert bool(update.delta["backbone.model.decode_head.classifier.weight"].any())
    others = set(update.delta) - in_head
    assert bool(others) == (method != "head")
    if method == "last-k":
        assert all(".stages.1." in name for name in others)
    if method == "lora":
        assert all(".lora_" in name for name in others)
    assert all(torch.isfinite(t).all() for t in update.delta.values())


def test_under_lora_a_last_layer_for_other_classes_alone_is_trained_of_the_head(tmp_path: Path) -> None:
    folder = small_segformer(tmp_path / "m", classes=7)
    asked = job(backbone={"name": str(folder), "image_size": 32}, tune={"method": "lora"})
    tuned = prepared(asked)[0].initial()
    in_head = {name.partition(".decode_head.")[2] for name in tuned if ".decode_head." in name}
    assert in_head == {"classifier.weight", "classifier.bias"}


def test_a_last_layer_of_other_classes_is_fresh_and_the_rest_is_kept(tmp_path: Path) -> None:
    from transformers import SegformerForSemanticSegmentation

    folder = small_segformer(tmp_path / "m", classes=5)
    given = SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()
    own = prepared_on(folder)[0].model.backbone.model.state_dict()
    assert own["decode_head.classifier.weight"].shape[0] == 2
    assert all(torch.equal(own[n], t) for n, t in given.items() if "classifier" not in n)
    again = prepared_on(folder)[0].model.backbone.model.state_dict()
    assert torch.equal(again["decode_head.classifier.weight"], own["decode_head.classifier.weight"])
    same = small_segformer(tmp_path / "same")
    kept = prepared_on(same)[0].model.backbone.model.state_dict()["decode_head.classifier.weight"]
    assert torch.equal(
        kept, SegformerForSemanticSegmentation.from_pretrained(same).decode_head.classifier.weight
    )


def test_an_encoder_without_head_gets_one_from_the_jobs_seed(tmp_path: Path) -> None:
    from transformers import SegformerForImageClassification

    folder = small_segformer(tmp_path / "m", classes=7, kind="ForImageClassification")
    given = SegformerForImageClassification.from_pretrained(folder).segformer.state_dict()
    first, second = (prepared_on(folder)[0].initial() for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(
        torch.equal(first[f"backbone.model.segformer.{n}"], t) for n, t in given.items() if "running" not in n
    )


def test_a_run_goes_on_from_another(tmp_path: Path) -> None:
    folder, run = small_segformer(tmp_path / "m", classes=5), tmp_path / "run"
    (run / "model").mkdir(parents=True)
    start = prepared_on(folder, weights="random")[0].initial()
    save_file(start, run / "model" / "model.safetensors")
    (run / "model" / "model.json").write_text("{}")
    again = prepared_on(folder, weights=str(run))[0].initial()
    assert set(again) == set(start) and all(torch.equal(again[n], start[n]) for n in start)


def test_other_folders_and_layers_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="wav2vec2 does not segment, expected segformer"):
        _ = prepared_on(small_wav2vec2(tmp_path / "w"))[0].model
    folder = small_segformer(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"tune\.layers: this backbone has 2 blocks, found 3"):
        _ = prepared(
            job(backbone={"name": str(folder), "image_size": 32}, tune={"method": "last-k", "layers": 3})
        )[0].model
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no preprocessor_config\.json"):
        _ = prepared_on(folder)[0].model
