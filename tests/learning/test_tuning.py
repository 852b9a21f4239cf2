"""What is trained: blocks, LoRA against peft's own count, batch norm that never moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atoll.backbones.encoder import Model
from atoll.backbones.vision import torchvision_trunk
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.export.safetensors import make_plain
from atoll.job.job import Job, TuneSection
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.support.small import grey_png_shard, image_job


def learner(name: str = "mobilenet_v2", **tune: object) -> Learner:
    job = image_job(name, tune=tune)
    return Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("resnet18", 8, "BasicBlock"),
        ("resnet50", 16, "Bottleneck"),
        ("vgg11", 8, "Conv2d"),
        ("vit_b_16", 12, "EncoderBlock"),
        ("convnext_tiny", 18, "CNBlock"),
        ("mobilenet_v2", 17, "InvertedResidual"),
        ("densenet121", 4, "_DenseBlock"),
        ("swin_t", 12, "SwinTransformerBlock"),
        ("squeezenet1_1", 8, "Fire"),
        ("googlenet", 9, "Inception"),
    ],
)
def test_a_network_opens_into_its_own_blocks(name: str, count: int, kind: str) -> None:
    with torch.device("meta"):
        trunk, _ = torchvision_trunk(name, 0)
    found = trainable.blocks(trunk)
    assert sum(type(block).__name__ == kind for block in found) == count
    held = [p for block in found for p in block.parameters()]
    assert len({id(p) for p in held}) == len(held), "a parameter is in two blocks"
    assert sum(p.numel() for p in held) >= 0.9 * sum(p.numel() for p in trunk.parameters())


def test_a_bert_opens_into_its_layers() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=3), add_pooling_layer=False)
    assert [type(b).__name__ for b in trainable.blocks(model)] == ["BertEmbeddings"] + 3 * ["BertLayer"]


@pytest.mark.parametrize("task", ["text-classification", "intent"])
def test_what_nobody_takes_of_a_bert_is_neither_its_last_block_nor_travels(task: str, tmp_path: Path) -> None:
    """BERT pools its states for its own pretraining; here they are pooled otherwise."""
    job = image_job("squeezenet1_1", task={"name": task})
    backbone = job.backbone.model_copy(update={"name": str(tiny_bert(tmp_path / "bert"))})
    data_info = {"classes": ["a", "b"], "intents": ["a", "b"], "tags": ["O"]}
    for tune in ({"method": "last-k", "layers": 1}, {"method": "lora"}, {"method": "full"}):
        asked = job.model_copy(update={"backbone": backbone, "tune": TuneSection.model_validate(tune)})
        names = set(Learner.of(asked, task_named(task), data_info).initial())
        assert not [name for name in names if "pooler" in name]
        tuned = {name.split(".")[4] for name in names if ".encoder.layer." in name}
        assert tuned == ({"1"} if tune["method"] == "last-k" else {"0", "1"})


def test_a_layer_that_torchs_attention_never_calls_gets_no_lora_factors() -> None:
    names = learner("vit_b_16", method="lora", rank=2).initial()
    assert any(".mlp." in name for name in names) and not any("out_proj" in name for name in names)


def test_last_k_tunes_the_last_blocks_and_the_head() -> None:
    names = set(trainable.trainable(learner(method="last-k", layers=2).model))
    assert {"head.weight", "head.bias"} < names
    assert {n.split(".")[3] for n in names if n.startswith("backbone")} == {"17", "18"}


def test_asking_for_more_blocks_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"tune\.layers: this backbone has 19 blocks, found 99"):
        learner(method="last-k", layers=99).model  # noqa: B018


def test_lora_tunes_only_its_factors_and_the_head() -> None:
    tensors = learner("vit_b_16", method="lora", rank=4, targets=["0", "3"]).initial()
    assert set(tensors) > {"head.weight", "head.bias"}
    assert all("lora_" in n for n in tensors if not n.startswith("head."))
    a = [t for n, t in tensors.items() if "lora_A" in n]
    b = [t for n, t in tensors.items() if "lora_B" in n]
    assert all(t.shape[0] == 4 for t in a)
    assert all((t == 0).all() for t in b), "LoRA starts as the identity"


def test_a_frozen_a_is_the_seeds_everywhere_and_does_not_travel() -> None:
    one, two = (learner(method="lora", rank=2, freeze_a=True) for _ in range(2))
    assert not [n for n in one.initial() if "lora_A" in n] and [n for n in one.initial() if "lora_B" in n]
    frozen = [dict(each.model.named_parameters()) for each in (one, two)]
    names = [n for n in frozen[0] if "lora_A" in n]
    assert names and all(torch.equal(frozen[0][n], frozen[1][n]) for n in names)
    assert not any(frozen[0][n].requires_grad for n in names)


@pytest.mark.parametrize(
    "kept",
    [
        {"padding": 4, "dilation": 4},
        {"padding": (2, 1), "dilation": (2, 1), "stride": 2},
        {"padding": "same", "dilation": 3},
        {"padding": 2, "dilation": 2, "padding_mode": "reflect"},
    ],
)
def test_lora_of_a_convolution_is_the_sum_of_weight_and_product_convolved(kept: dict[str, Any]) -> None:
    """The oracle: (W + alpha / r * B A) as one convolution's weight, A and B multiplied out by einsum."""
    base = nn.Conv2d(3, 5, 3, **kept)
    weight, bias = base.weight.detach().clone(), base.bias
    model = Model(nn.ModuleDict({"model": nn.Sequential(base)}), nn.Linear(1, 1))  # type: ignore[arg-type]
    trainable.mark_trainable(model, TuneSection(method="lora", rank=2, alpha=3.0), 0)
    factors = {n.rsplit(".", 3)[1]: p for n, p in trainable.trainable(model).items() if "lora" in n}
    with torch.no_grad():
        factors["lora_B"].normal_()
    product = torch.einsum("orxy,rihw->oihw", factors["lora_B"], factors["lora_A"])
    whole = nn.Conv2d(3, 5, 3, **kept)
    whole.weight, whole.bias = nn.Parameter(weight + 3.0 / 2 * product), bias
    pictures = torch.randn(2, 3, 11, 14)
    network: Any = model.backbone.model
    torch.testing.assert_close(network(pictures), whole(pictures), rtol=1e-5, atol=1e-5)
    make_plain(model)
    torch.testing.assert_close(network[0].weight, whole.weight, rtol=1e-5, atol=1e-5)
    assert type(network[0]) is nn.Conv2d and network[0].dilation == whole.dilation


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "ssd300_vgg16"])
def test_a_network_of_dilated_convolutions_has_the_same_shapes_with_lora(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        network = models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
        body: nn.Module = network.get_submodule("backbone")
        pictures = torch.empty(2, 3, 300, 300)
        plain = {key: value.shape for key, value in body(pictures).items()}
        holder: Any = nn.ModuleDict({"model": body})
        trainable.mark_trainable(Model(holder, nn.Linear(1, 1)), TuneSection(method="lora", rank=2), 0)
        assert any(m.dilation != (1, 1) for n, m in body.named_modules() if n.endswith("lora_A.default"))
        assert {key: value.shape for key, value in body(pictures).items()} == plain


def test_a_head_on_top_is_trained_with_lora_unless_it_is_frozen() -> None:
    assert "head.weight" in learner(method="lora", rank=2).initial()
    assert not [n for n in learner(method="lora", rank=2, head="frozen").initial() if n.startswith("head.")]
    with pytest.raises(
        ConfigError, match=r"tune\.head: this head is a layer on top of the backbone, expected"
    ):
        learner(method="lora", rank=2, head="lora").initial()
    with pytest.raises(ValueError, match="head has no meaning with method = 'full'"):
        TuneSection(method="full", head="frozen")


def test_what_a_stage_has_tuned_of_the_head_stays_tuned_under_lora() -> None:
    then = [{"method": "lora", "after": 1}]
    asked = image_job("mobilenet_v2", tune={"method": "head", "then": then})
    assert [stage.tune.head for stage in asked.stages] == [None, "trained"]
    with pytest.raises(ConfigError, match="would leave behind what head tuned"):
        image_job("mobilenet_v2", tune={"method": "head", "then": [then[0] | {"head": "frozen"}]})


def test_lora_targets_that_match_nothing_are_an_error_that_names_layers() -> None:  # row 62
    with pytest.raises(ConfigError, match=r"tune\.targets: no layer is called \['query'\], expected some of"):
        learner(method="lora", targets=["query"]).model  # noqa: B018


def test_the_first_tensors_depend_on_the_seed_alone() -> None:
    a, b = (learner(method="lora", rank=2).initial() for _ in range(2))
    torch.manual_seed(0)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", ["last-k", "lora", "full"])
def test_training_moves_what_is_tuned_and_never_batch_norms_statistics(method: str) -> None:
    found = learner(method=method)
    shard = grey_png_shard(12, classes=3)
    before = {n: b.clone() for n, b in found.model.named_buffers()}
    frozen = {n: p.clone() for n, p in found.model.named_parameters() if not p.requires_grad}
    update = train_model(found, found.initial(), shard, found.job, client="c", round=1, plan={})
    assert all(torch.equal(b, before[n]) for n, b in found.model.named_buffers())
    assert all(torch.equal(dict(found.model.named_parameters())[n], p) for n, p in frozen.items())
    assert set(update.delta) == set(trainable.trainable(found.model))
    assert any((d != 0).any() for n, d in update.delta.items() if n.startswith("backbone"))


def test_training_twice_from_the_same_tensors_gives_the_same_bits() -> None:
    shard = grey_png_shard(10, classes=3)
    found = learner(method="full")
    first = found.initial()
    runs = [train_model(found, first, shard, found.job, client="c", round=1, plan={}) for _ in range(2)]
    fresh = learner(method="full")
    runs.append(train_model(fresh, fresh.initial(), shard, found.job, client="c", round=1, plan={}))
    for run in runs[1:]:
        assert all(torch.equal(run.delta[n], runs[0].delta[n]) for n in first)


def test_the_proximal_term_holds_a_client_back() -> None:
    """Three small steps over the same examples; with mu, half of the way back before each."""
    train = {"lr": 1e-4, "batch_size": 12, "epochs": 3}
    job = image_job("mobilenet_v2", tune={"method": "last-k"}, train=train)
    found = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    shard, start = grey_png_shard(12, classes=3), found.initial()
    norms = []
    for mu in (0.0, 5000.0):
        update = train_model(found, start, shard, job, client="c", round=1, plan={"proximal_mu": mu})
        norms.append(sum(float(d.square().sum()) for d in update.delta.values()) ** 0.5)
    assert norms[1] / norms[0] == pytest.approx((1 + 0.5 + 0.25) / 3, rel=0.05)


def test_dropout_works_in_tuned_parts_only() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
            self.tuned = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))

    model = Model(Encoder(), nn.Linear(2, 2))  # type: ignore[arg-type]
    model.backbone.frozen.requires_grad_(False)  # type: ignore[union-attr]
    trainable.training_mode(model)
    modes = {n: m.training for n, m in model.named_modules() if not list(m.children())}
    assert modes == {
        "backbone.frozen.0": False, "backbone.frozen.1": False,
        "backbone.tuned.0": True, "backbone.tuned.1": True, "backbone.tuned.2": False,
        "head": True,
    }  # fmt: skip


def test_a_key_without_meaning_for_the_method_is_refused() -> None:
    with pytest.raises(ValueError, match="rank has no meaning"):
        TuneSection(method="full", rank=3)


def test_shards_select_keeps_rows_together() -> None:
    shard: Shard = grey_png_shard(6, classes=3)
    part = shard.select([4, 1])
    assert part.keys == (shard.keys[4], shard.keys[1])
    assert part.targets.tolist() == [shard.targets[4], shard.targets[1]]
    assert isinstance(image_job("resnet18"), Job)
