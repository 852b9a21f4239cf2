"""Random augmentation: torchvision's distributions, our streams; the frozen backbone stays frozen."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from atoll.backbones.augmentation import (
    DROPPED,
    crop_frame,
    framed,
    hidden_tokens,
    jittered,
    varied_image,
)
from atoll.backbones.brought.names import IMAGE_AUGMENTATIONS
from atoll.backbones.encoder import Encoder, Variation
from atoll.backbones.resolve import resolve
from atoll.backbones.text import load_text_encoder
from atoll.backbones.vision import load_vision_encoder
from atoll.client.training.local_sgd import variation
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection, Job
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import stream
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.support.small import grey_png_shard, image_job


def picture(width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


def test_crops_have_the_distribution_of_torchvisions_random_resized_crop() -> None:
    from torchvision.transforms import RandomResizedCrop

    draw = stream(1, "test")
    for height, width in ((60, 60), (200, 50), (30, 400)):
        ours = torch.tensor([crop_frame(height, width, draw) for _ in range(4000)], dtype=torch.float64)
        image = torch.zeros(3, height, width)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = torch.tensor(
                [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)],
                dtype=torch.float64,
            )
        error = (ours.var(0) / 4000 + theirs.var(0) / 4000).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-9).all(), (height, width)
        if width < 400:  # of the longest image all but a few crops are one and the same
            torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=1e-9)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (24, 24), (24, 40), (40, 24), (9, 7)])
def test_a_frame_is_what_torchvision_makes_of_an_image_of_any_size(width: int, height: int) -> None:
    image = picture(width, height)
    theirs = functional.center_crop(functional.resize(image, [24], antialias=True), [24, 24])
    assert same(framed(image, 24), theirs)


def test_flips_are_half_of_the_time_and_nothing_else() -> None:
    square = framed(picture(), 24)
    flipped = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seen = [varied_image(picture(), 24, ["flip"], stream(1, "flip", i)) for i in range(400)]
    turned = [same(image, flipped) for image in seen]
    assert all(t or same(image, square) for image, t in zip(seen, turned, strict=True))
    assert abs(sum(turned) - 200) < 5 * 10  # five standard deviations, sqrt(400 / 4) each


def test_colors_stay_within_the_ranges_of_color_jitter() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [np.asarray(jittered(grey, stream(1, "jitter", i))).mean() for i in range(300)]
    assert 58 <= min(values) < 65 and 135 < max(values) <= 142  # brightness times 0.6 to 1.4


def test_an_image_varied_by_nothing_is_the_image_as_it_is() -> None:
    assert same(varied_image(picture(), 24, [], stream(1, "x")), framed(picture(), 24))


@pytest.mark.parametrize("name", IMAGE_AUGMENTATIONS)
def test_an_augmentation_depends_on_its_stream_alone(name: str) -> None:
    seen = [varied_image(picture(), 24, [name], stream(7, "augment", i % 20)) for i in range(40)]
    assert all(image.size == (24, 24) for image in seen)
    assert all(same(a, b) for a, b in zip(seen[:20], seen[20:], strict=True))
    assert sum(not same(seen[0], other) for other in seen[1:20]) > 3


def test_the_order_of_the_names_changes_nothing() -> None:
    a = varied_image(picture(), 24, IMAGE_AUGMENTATIONS, stream(7, "x"))
    assert same(a, varied_image(picture(), 24, IMAGE_AUGMENTATIONS[::-1], stream(7, "x")))


def test_a_tenth_of_the_tokens_is_hidden_and_no_special_one() -> None:
    ids, special = [1, *range(10, 60), 2], [1, *[0] * 50, 1]
    masked = [hidden_tokens(ids, special, 99, stream(1, "t", i)) for i in range(400)]
    assert all(len(m) == len(ids) and (m[0], m[-1]) == (1, 2) for m in masked)
    assert all(a in (b, 99) for m in masked for a, b in zip(m, ids, strict=True))
    hidden = sum(m.count(99) for m in masked)
    assert abs(hidden - 2000) < 5 * (20_000 * DROPPED * (1 - DROPPED)) ** 0.5
    without = [hidden_tokens(ids, special, None, stream(1, "t", i)) for i in range(400)]
    assert [[i for i in m if i != 99] for m in masked] == without


def test_a_text_of_which_nothing_would_be_left_stays() -> None:
    assert all(hidden_tokens([5], [0], None, stream(1, "t", i)) == [5] for i in range(100))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_batch_prepared_anywhere_holds_what_each_inputs_own_stream_makes(tmp_path: Path, kind: str) -> None:
    encoder: Encoder
    if kind == "text":
        section = BackboneSection(name=str(tiny_bert(tmp_path / "bert")), max_tokens=32)
        encoder = load_text_encoder(resolve(section, 1), section, 1)
        inputs: list[object] = ["good bad " * (1 + i % 9) for i in range(21)]
        names: tuple[str, ...] = ("token-dropout",)
    else:
        section = BackboneSection(name="torchvision:squeezenet1_1", weights="random", image_size=32)
        encoder = load_vision_encoder(resolve(section, 1), section, 1)
        inputs, names = list(grey_png_shard(21, classes=3).inputs), IMAGE_AUGMENTATIONS
    varied = Variation(names, lambda place: stream(3, "augment", 0, str(place)))
    for rows, prepare in reversed(list(encoder.fixed_batches(inputs, 8, varied))):
        batch = prepare()
        for place, row in enumerate(rows):
            alone = encoder.preprocess_and_collate(
                [inputs[row]], Variation(names, lambda _, r=row: varied.stream(r))
            )  # type: ignore[misc]
            for name, tensor in alone.items():
                assert torch.equal(batch[name][place, : tensor.shape[1]], tensor[0]), (row, name)


def test_the_draws_of_a_training_batch_depend_on_seed_round_client_and_batch() -> None:
    job = image_job("squeezenet1_1", train={"augment": ["flip"]})

    def first(job: Job, *where: object) -> float:
        varied = variation(job, *where)  # type: ignore[arg-type]
        assert varied is not None and varied.names == ("flip",)
        return float(torch.rand((), generator=varied.stream(0)))

    assert first(job, 1, "a", 0) == first(job, 1, "a", 0)
    others = [(2, "a", 0), (1, "b", 0), (1, "a", 1)]
    seeded = job.model_copy(update={"seed": 6})
    assert len({first(job, 1, "a", 0), first(seeded, 1, "a", 0), *(first(job, *o) for o in others)}) == 5
    assert variation(image_job("squeezenet1_1"), 1, "a", 0) is None


def test_training_on_augmented_batches_leaves_the_frozen_backbone_as_it_is() -> None:
    """MobileNetV2 has batch norms, whose statistics would move in training mode."""
    from atoll.client.training.local_sgd import train_model

    job = image_job("mobilenet_v2", train={"augment": ["flip", "color"], "batch_size": 4})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    before = {name: t.clone() for name, t in learner.model.backbone.state_dict().items()}
    recorded: list[bool] = []
    learner.model.backbone.register_forward_hook(
        lambda m, i, o: recorded.append(o.requires_grad or m.training)
    )
    shard = grey_png_shard(8, classes=2)
    update = train_model(learner, learner.initial(), shard, job, client="c", round=1, plan={})
    assert set(update.delta) == {"head.weight", "head.bias"} and bool(update.delta["head.weight"].any())
    assert recorded == [False, False]
    assert all(torch.equal(t, before[name]) for name, t in learner.model.backbone.state_dict().items())


def test_a_view_is_drawn_evenly_from_the_clients_stream() -> None:
    from atoll.client.training.batches import sample_views

    drawn = sample_views(3, np.arange(200, dtype=np.uint64), 150)
    assert drawn.shape == (200, 150)
    counts = np.bincount(drawn.ravel(), minlength=3)
    assert abs(counts - 10_000).max() < 5 * (30_000 * 2 / 9) ** 0.5
    assert (sample_views(3, np.array([17], dtype=np.uint64), 20)[0] == drawn[17, :20]).all()


def test_a_head_trains_on_the_views_that_its_streams_draw() -> None:
    """The oracle: one table without views whose rows are, in each epoch, those of the drawn view."""
    from atoll.client.heads.feature_table import ClientRows, FeatureTable
    from atoll.client.heads.layers import LOSSES
    from atoll.client.heads.train import HeadTrainingConfig, train_heads
    from atoll.client.training.batches import batches, epoch_seeds, sample_views

    job = image_job("squeezenet1_1", train={"lr": 0.1, "batch_size": 4, "epochs": 2})
    g = torch.Generator().manual_seed(0)
    views, targets = torch.randn(3, 10, 6, generator=g), torch.randint(2, (10,), generator=g)
    head = {"head.weight": torch.zeros(2, 6), "head.bias": torch.zeros(2)}
    work = ClientRows("c", np.arange(10))
    local = HeadTrainingConfig(job, LOSSES["softmax"], round=4)
    found = train_heads(head, FeatureTable.of(views, targets), [work], local)[0]
    layer = torch.nn.Linear(6, 2).double()
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    drawn = np.concatenate([sample_views(3, epoch_seeds(job, 4, ["c"], e, "view"), 10) for e in (0, 1)])
    for number, rows in enumerate(batches(10, job, 4, "c")):
        epoch = number // 3  # 10 examples are three batches of 4, 4 and 2
        inputs = torch.stack([views[drawn[epoch, row], row] for row in rows]).double()
        loss = torch.nn.functional.cross_entropy(layer(inputs), targets[rows])
        gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
        with torch.no_grad():
            layer.weight -= 0.1 * gradients[0]
            layer.bias -= 0.1 * gradients[1]
    torch.testing.assert_close(
        found.delta["head.weight"].double(), layer.weight.detach(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.delta["head.bias"].double(), layer.bias.detach(), rtol=1e-4, atol=1e-6)


def test_views_of_one_example_are_kept_apart_and_shared_between_numbers_of_views() -> None:
    shard = grey_png_shard(5, classes=2)
    data_info = {"classes": ["a", "b"]}

    def features(**train: object) -> torch.Tensor:
        job = image_job("squeezenet1_1", train={"augment": ["crop"], **train})
        return Learner.of(job, task_named(job.task.name), data_info).features.for_training(shard)

    three = features(cached_views=3)
    assert torch.equal(features(cached_views=2), three[:2])
    assert len({hashlib.sha256(v.numpy().tobytes()).digest() for v in three}) == 3
    assert not torch.equal(features(cached_views=1, augment=["flip"]), three[:1])


@pytest.mark.parametrize(
    ("task", "augment", "channels_last", "line"),
    [
        (
            "text-classification",
            ["flip"],
            False,
            "train.augment: expected 'token-dropout' for text-classification, found 'flip'",
        ),
        (
            "image-classification",
            ["flip", "mixup"],
            False,
            "train.augment: expected 'crop', 'rotate', 'flip', 'color' for image-classification,"
            " found 'mixup'",
        ),
        (
            "text-classification",
            [],
            True,
            "backbone.channels_last: expected false for text-classification, found true:"
            " texts have no channels",
        ),
    ],
)
def test_what_a_task_has_not_got_is_refused_by_name(
    task: str, augment: list[str], channels_last: bool, line: str
) -> None:
    job = image_job("squeezenet1_1", task={"name": task}, train={"augment": augment})
    backbone = BackboneSection(name="hf:x", channels_last=channels_last)
    with pytest.raises(ConfigError) as caught:
        task_named(task).check(job.model_copy(update={"backbone": backbone}))
    assert str(caught.value) == line
