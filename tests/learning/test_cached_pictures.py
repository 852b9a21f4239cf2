"""States of pictures below the first tuned block: the same bits kept or not; networks skip what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atoll.backbones.dense_vision import PictureEncoder, WholePictures
from atoll.backbones.encoder import Model
from atoll.backbones.vision import VisionEncoder, torchvision_trunk
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.data.shard import Shard
from atoll.datasets.synthetic.shapes import generated_shapes
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.feature_cache import FeatureCache
from atoll.learning.learner import Learner
from atoll.learning.prefix.fixed_states import FixedStates, input_keys
from atoll.learning.prefix.frozen_prefix import FrozenPrefix
from atoll.learning.prefix.kept_states import KeptStatesOfFixed
from atoll.learning.trainable import _last_blocks as last_blocks
from atoll.learning.trainable import training_mode
from atoll.protocol.tensors import Tensors
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from atoll.tasks.segmentation.task import Segmenter
from tests.client.dp.test_private_training import private
from tests.learning.test_cached_states import assert_same_bits, trained
from tests.support.small import grey_png_shard, image_job
from tests.support.task_jobs import TABLES

LAST_K, LORA = {"method": "last-k", "layers": 1}, {"method": "lora", "layers": 1, "rank": 2}
CLASSES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every picture whose states are computed from now on."""
    counted: list[int] = []
    whole = FrozenPrefix.states_of_each

    def noted(self: FrozenPrefix, examples: Any, **how: Any) -> list[torch.Tensor]:
        counted.extend([1] * len(examples))
        return whole(self, examples, **how)

    monkeypatch.setattr(FrozenPrefix, "states_of_each", noted)
    return counted


def job_of(tune: dict[str, Any], states: str | None = "fp32", name: str = "resnet18", **tables: Any) -> Job:
    train = {"optimizer": "sgd", "lr": 0.05, "batch_size": 4} | tables.pop("train", {})
    kept = {} if states is None else {"cached_states": states}
    return image_job(name, tune=tune, train=train | kept, **tables)


def at_work(job: Job, count: int = 9) -> tuple[Learner, Shard]:
    learner = Learner.of(job, task_named(job.task.name), {"classes": CLASSES})
    return learner, grey_png_shard(count, classes=len(CLASSES))


def without_disk(learner: Learner) -> None:
    """Let the learner compute every picture's states whenever a batch needs them, and keep none."""
    kept = learner.kept_states
    assert isinstance(kept, KeptStatesOfFixed)
    name = kept.given.name

    def each(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states = kept.prefix.states_of_each(list(batch[name]), threads=1, done=int)
        return batch | {name: kept.prefix.placed(torch.stack(states))}

    object.__setattr__(kept, "in_place_of_inputs", each)
    object.__setattr__(kept, "keep", lambda count, batch_of: None)


@pytest.mark.parametrize("tune", [LAST_K, LORA], ids=["last-k", "lora"])
def test_training_has_the_same_bits_with_the_cache_and_without(
    tune: dict[str, Any], computed: list[int]
) -> None:
    job = job_of(tune, train={"epochs": 2})
    learner, shard = at_work(job)
    without_disk(learner)
    expected = trained(learner, shard)
    computed.clear()
    assert_same_bits(trained(*at_work(job)), expected)
    assert len(computed) == len(shard), "every picture passes the frozen blocks once"
    assert_same_bits(trained(*at_work(job)), expected)
    assert len(computed) == len(shard), "a second run computes nothing below the cut"


@pytest.mark.parametrize("tune", [LAST_K, LORA], ids=["last-k", "lora"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_is_that_of_the_whole_network_but_for_rounding(
    tune: dict[str, Any], channels_last: bool
) -> None:
    backbone = {"name": "torchvision:resnet18", "weights": "random", "image_size": 64}
    tables = {"backbone": backbone | {"channels_last": channels_last}}
    kept, whole = (trained(*at_work(job_of(tune, states, **tables))) for states in ("fp32", None))
    torch.testing.assert_close(kept, whole, rtol=1e-3, atol=1e-5)


def test_private_training_has_the_same_bits_with_the_cache_and_without() -> None:
    def update(learner: Learner, shard: Shard) -> Tensors:
        start = learner.initial()
        return train_privately(learner, start, shard, private(), client="c", round=1, plan={}).delta

    learner, shard = at_work(job_of(LAST_K, name="squeezenet1_1"))
    without_disk(learner)
    expected = update(learner, shard)
    assert_same_bits(update(*at_work(job_of(LAST_K, name="squeezenet1_1"))), expected)
    whole = update(*at_work(job_of(LAST_K, None, "squeezenet1_1")))
    torch.testing.assert_close(expected, whole, rtol=1e-3, atol=1e-5)


def test_states_of_a_picture_depend_on_no_neighbour(computed: list[int]) -> None:
    learner, shard = at_work(job_of(LAST_K))
    together = learner.batch(shard, range(len(shard)))["pixel_values"]
    assert together.shape == (len(shard), 1, 1, 1, 512)
    for row in (0, 5):
        other, _ = at_work(job_of(LAST_K))
        assert torch.equal(other.batch(shard, [row])["pixel_values"][0], together[row])
    learner.keep_states(shard.select([0, 0, 1, 2, 1]))
    assert len(computed) == len(shard)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_what_is_lost_or_damaged_is_computed_again(
    computed: list[int], own_cache: Path, damage: Callable[[Path], Any]
) -> None:
    learner, shard = at_work(job_of(LAST_K))
    learner.keep_states(shard.select([0, 1]))
    learner.keep_states(shard)
    expected = trained(learner, shard)
    damage(sorted(own_cache.rglob("*.safetensors"))[0])
    before = len(computed)
    assert_same_bits(trained(*at_work(job_of(LAST_K))), expected)
    assert 0 < len(computed) - before < len(shard)


def test_another_network_size_cut_or_precision_has_its_own_cache(own_cache: Path) -> None:
    larger = {"name": "torchvision:resnet18", "weights": "random", "image_size": 40}
    jobs = [
        job_of(LAST_K),
        job_of(LAST_K, "bf16"),
        job_of(LAST_K | {"layers": 2}),
        job_of(LAST_K, backbone=larger),
        job_of(LAST_K, seed=6),
    ]
    for count, job in enumerate(jobs, start=1):
        learner, shard = at_work(job)
        learner.keep_states(shard)
        assert len(list((own_cache / "features").iterdir())) == count


@pytest.mark.parametrize("numbers", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_in_order_rounded_to_their_dtype(
    tmp_path: Path, numbers: int, dtype: torch.dtype
) -> None:
    cache, draw = FixedStates(FeatureCache(tmp_path), dtype), torch.Generator().manual_seed(0)
    inputs, states = torch.rand(5, 3, 2, generator=draw), torch.rand(5, 1, numbers, generator=draw)
    keys = input_keys(inputs)
    assert list(cache.missing([keys[n] for n in (0, 1, 1, 2)]).values()) == [0, 1, 3]
    cache.keep(keys[:3], inputs[:3], lambda part: list(states[: len(part)]))
    cache.keep(keys[3:], inputs[3:], lambda part: list(states[3:]))
    assert cache.missing(keys) == {}
    found = cache.take([keys[n] for n in (4, 0, 2, 0)])
    assert torch.equal(found[:, :numbers], states[[4, 0, 2, 0], 0].to(dtype).float())
    with pytest.raises(KeyError):
        cache.take(input_keys(inputs + 1))


DRAWING = ("Dropout", "StochasticDepth", "Dinov2DropPath", "BeitDropPath", "ConvNextDropPath")
"""Layers that draw, as the two passes would differently."""

FAMILIES = [
    "resnet18", "densenet121", "googlenet", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small",
    "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "swin_t",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_torchvision_begin_at_their_states(name: str) -> None:
    trunk, width = torchvision_trunk(name, 0)
    encoder = VisionEncoder(trunk.eval(), 64, (0.0,) * 3, (1.0,) * 3, width)
    check_rest(Model(encoder, nn.Linear(width, 2)), 2)


def test_a_vit_whose_first_block_makes_rows_of_a_picture_begins_at_its_states() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    network = VisionTransformer(32, 8, 3, 2, 16, 24)
    network.heads = nn.Identity()
    encoder = VisionEncoder(network.eval(), 32, (0.0,) * 3, (1.0,) * 3, 16)
    check_rest(Model(encoder, nn.Linear(16, 2)), 1)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Beit", "ConvNext", "ResNet", "CLIPVision"])
def test_networks_of_transformers_begin_at_their_states(kind: str) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
        "ResNet": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8},
    }
    rows = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes.get(kind, rows))
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    network = getattr(network, "vision_model", network)
    encoder = VisionEncoder(network, 32, (0.0,) * 3, (1.0,) * 3, 16)
    check_rest(Model(encoder, nn.Linear(16, 2)), 2)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_segmenters_begin_at_their_states(name: str) -> None:
    check_rest(segmenter(name), 1)


def check_rest(model: Model, tuned: int) -> None:
    """The last blocks' outputs and gradients are the whole network's but for rounding."""
    prefix, size = cut(model, tuned), model.backbone.size
    pictures = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    states = torch.stack(prefix.states_of_each(list(pictures), threads=1, done=int))
    training_mode(model)
    for module in model.modules():
        module.training &= type(module).__name__ not in DRAWING
    results = []
    for given in (pictures, prefix.placed(states.flatten(1))):
        model.zero_grad()
        output = model({"pixel_values": given})
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"output": output.detach()} | {n: g.clone() for n, g in gradients.items()})
    whole, rest = results
    assert len(whole) > 2
    for name, expected in whole.items():
        assert (rest[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
    assert set(prefix.frozen[1:]) <= set(prefix.skipped), "all but one that may make rows of a picture"


def cut(model: Model, tuned: int) -> FrozenPrefix:
    model.requires_grad_(False)
    for block in last_blocks(model.backbone.model, tuned, model.head):
        block.requires_grad_(True)
    model.head.requires_grad_(True)
    return FrozenPrefix(model)


def segmenter(name: str, encoder: type[PictureEncoder] = WholePictures) -> Model:
    from torchvision import models

    network = models.get_model(name, weights=None, weights_backbone=None, num_classes=2).eval()
    network.aux_classifier = None
    return Segmenter(encoder(network, 64, (0.0,) * 3, (1.0,) * 3), network.classifier)


def test_a_network_that_looks_past_the_cut_is_refused() -> None:
    """LRASPP's classifier sees an early block's output too."""
    with pytest.raises(ConfigError, match="take more than the states of the block below them"):
        cut(segmenter("lraspp_mobilenet_v3_large"), 1)


def test_a_network_whose_pictures_differ_in_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens .* pictures of one size \(classifiers, segmenters\)"):
        cut(segmenter("fcn_resnet50", PictureEncoder), 1)


def test_a_segmenter_has_the_same_bits_with_the_cache_and_without(computed: list[int]) -> None:
    small = {"name": "torchvision:deeplabv3_mobilenet_v3_large", "weights": "random", "image_size": 64}

    def segmenting(states: str | None) -> tuple[Learner, Shard]:
        job = job_of(LAST_K, states, **TABLES["segmentation"] | {"backbone": small})
        task = task_named("segmentation")
        table = task.from_builtin(generated_shapes(0, 6), job)
        info = task.merge_info([task.local_info(table.train, job.data, job.task.options)])
        return (learner := Learner.of(job, task, info)), learner.task.shard(table.train, info)

    learner, shard = segmenting("fp32")
    without_disk(learner)
    expected = trained(learner, shard)
    computed.clear()
    assert_same_bits(trained(*segmenting("fp32")), expected)
    assert len(computed) == len(shard)
    learner, _ = segmenting("fp32")
    tensors, inputs = learner.initial(), [shard.inputs[0]]
    learner.evaluate(tensors, shard)
    plain, _ = segmenting(None)
    asked = [one.predictions(tensors, inputs) for one in (learner, plain)]
    assert torch.equal(*asked), "who asks gives pictures"


@pytest.mark.processes
def test_engines_worker_processes_and_a_second_run_agree(tmp_path: Path) -> None:
    few = {"clients": 90, "cohort": 2, "rounds": 2}
    tables = {
        "federation": few,
        "data": {"source": "digits", "test_fraction": 0.02},
        "evaluate": {"clients": 2},
    }
    job = job_of(LAST_K, "bf16", "squeezenet1_1", **tables)
    ways: dict[str, dict[str, Any]] = {
        "inline": {"engine": "inline"}, "two": {"workers": 2}, "warm": {"engine": "loop"},
    }  # fmt: skip
    found = {
        name: simulate(job, tmp_path / name, on_event=ignore_events, report=False, **how).model_sha256
        for name, how in ways.items()
    }
    assert len(set(found.values())) == 1, found
