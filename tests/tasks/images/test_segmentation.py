"""Segmentation: pairs of images and masks as they are read, and what is learnt from them."""

import hashlib
import math
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from atoll.client.training.local_sgd import train_model
from atoll.data.dataset import Dataset
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner, sum_states
from atoll.tasks import task_named
from atoll.tasks.segmentation.metrics import Dice, MeanIoU
from atoll.tasks.segmentation.task import SEGMENTATION

DATA = DataSection(source="./here")


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pair(number: int, side: int = 20) -> tuple[bytes, bytes]:
    """A bright square on dark ground, and which pixels it takes; one pixel isn't labelled."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), dtype=np.uint8)
    x, y = rng.integers(0, side // 2, 2)
    mask[y : y + side // 2, x : x + side // 2] = 1
    pixels[mask == 1] += 180
    mask[0, 0] = 255
    return png(pixels), png(mask)


def folder(root: Path, count: int = 6) -> Path:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        image, mask = pair(number)
        (root / "images" / f"{number}.png").write_bytes(image)
        (root / "masks" / f"{number}.png").write_bytes(mask)
    return root


def test_a_folder_of_images_and_masks_is_read_pair_by_pair(tmp_path: Path) -> None:
    table = SEGMENTATION.read(folder(tmp_path / "d"), DATA, {})
    assert len(table.train) == 6 and table.test is None


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    folder(tmp_path / "train"), folder(tmp_path / "test", 2)
    table = SEGMENTATION.read(tmp_path, DATA, {})
    assert table.test is not None
    assert (len(table.train), len(table.test)) == (6, 2)


def test_rows_with_paths_are_the_same_examples_as_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    lines = [f"images/{n}.png,masks/{n}.png" for n in range(6)]
    (root / "pairs.csv").write_text("\n".join(["image,mask", *lines]))
    by_rows = SEGMENTATION.read(root / "pairs.csv", DATA, {})
    (root / "pairs.csv").unlink()
    assert SEGMENTATION.keys(by_rows.train) == SEGMENTATION.keys(SEGMENTATION.read(root, DATA, {}).train)


def test_what_is_written_is_read_back_with_the_same_keys(tmp_path: Path) -> None:
    table = SEGMENTATION.read(folder(tmp_path / "d"), DATA, {})
    SEGMENTATION.write(table.train, tmp_path / "out", DATA)
    again = SEGMENTATION.read(tmp_path / "out", DATA, {})
    assert SEGMENTATION.keys(again.train) == SEGMENTATION.keys(table.train)


def _rgb_mask(root: Path) -> None:
    (root / "masks" / "0.png").write_bytes(pair(0)[0])


def _other_size(root: Path) -> None:
    (root / "masks" / "0.png").write_bytes(png(np.zeros((9, 7), dtype=np.uint8)))


def _no_mask(root: Path) -> None:
    (root / "masks" / "0.png").unlink()


def _text(root: Path) -> None:
    (root / "masks" / "0.png").write_text("no picture")


def _cut(root: Path) -> None:
    path = root / "masks" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_rgb_mask, "mask of mode RGB, expected one 8-bit channel"),
        (_other_size, "mask of 7 x 9 pixels, expected 20 x 20"),
        (_no_mask, "image without mask, expected"),
        (_text, "no mask, expected a PNG"),
        (_cut, "damaged mask"),
    ],
)
def test_a_bad_pair_is_one_line(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder(tmp_path / "d"))
    with pytest.raises(DataError, match=said) as told:
        SEGMENTATION.read(tmp_path / "d", DATA, {})
    assert "\n" not in str(told.value) and "0.png" in str(told.value)
    assert SEGMENTATION.inspect(tmp_path / "d", DATA, {}).bad == 1


@pytest.mark.parametrize(("drawn", "said"), [(255, "255 stands for pixels that are ignored"), (0, "is 0$")])
def test_masks_of_one_class_alone_are_remarked(tmp_path: Path, drawn: int, said: str) -> None:
    root = folder(tmp_path / "d")
    for path in (root / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        path.write_bytes(png(np.where(mask == 1, drawn, 0).astype(np.uint8)))
    (note,) = SEGMENTATION.inspect(root, DATA, {}).notes
    assert note.startswith("train: the only class in all masks is 0") and re.search(said, note)
    assert SEGMENTATION.read(root, DATA, {}).notes == (note,)
    assert SEGMENTATION.inspect(folder(tmp_path / "two"), DATA, {}).notes == ()


def test_a_class_without_name_is_refused(tmp_path: Path) -> None:
    table = SEGMENTATION.read(folder(tmp_path / "d"), DATA, {})
    assert SEGMENTATION.merge_info([SEGMENTATION.local_info(table.train, DATA, {})]) == {
        "classes": ["0", "1"]
    }
    named = {"classes": ["ground"]}
    with pytest.raises(DataError, match="a mask has class 1, expected 0 to 0"):
        SEGMENTATION.local_info(table.train, DATA, named)


def test_iou_and_dice_by_hand_and_nothing_from_nothing() -> None:
    iou, dice = MeanIoU(3), Dice(3)
    said, true = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    for metric in (iou, dice):
        metric.update(said[:0], true[:0])
        assert math.isnan(float(metric.compute()))
        metric.update(said, true)
    # Class 0: 1 / 2 and 2 / 3; class 1: 2 / 3 and 4 / 5; class 2 isn't there.
    assert float(iou.compute()) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert float(dice.compute()) == pytest.approx((2 / 3 + 4 / 5) / 2)


def job(method: str = "full", name: str = "lraspp_mobilenet_v3_large", **tables: object) -> Job:
    table: dict[str, object] = {
        "name": "small",
        "seed": 5,
        "task": {"name": "segmentation", "options": {"classes": ["ground", "square"]}},
        "data": {"source": "./here"},
        "backbone": {"name": f"torchvision:{name}", "weights": "random", "image_size": 32},
        "tune": {"method": method} | ({"layers": 2} if method == "last-k" else {}),
        "train": {"lr": 0.003, "batch_size": 4, "optimizer": "adam"},
    }
    return Job.parse(table | tables, origin="test")


def prepared(asked: Job, count: int = 8) -> tuple[Learner, Shard]:
    pairs = [pair(n) for n in range(count)]
    table = pa.table(
        {
            "image": [{"bytes": image, "path": None} for image, _ in pairs],
            "mask": [{"bytes": mask, "path": None} for _, mask in pairs],
        }
    )
    keys = [hashlib.sha256(image).digest() for image, _ in pairs]
    learner = Learner.of(asked, task_named("segmentation"), {"classes": ["ground", "square"]})
    return learner, learner.task.shard(Dataset(table), learner.data_info, keys)


@pytest.mark.parametrize("method", ["head", "last-k", "lora", "full"])
def test_every_way_of_tuning_moves_the_head_and_what_it_says(method: str) -> None:
    learner, shard = prepared(job(method))
    before = learner.initial()
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    in_head = {name for name in update.delta if ".classifier." in name}
    assert in_head == {f"backbone.model.classifier.{n}" for n, _ in learner.model.head.named_parameters()}
    assert not any("lora" in name for name in in_head)
    assert (set(update.delta) == in_head) == (method == "head")
    assert all(torch.isfinite(t).all() for t in update.delta.values())
    assert any(t.any() for name, t in update.delta.items() if name in in_head)


def test_the_metric_over_clients_is_that_of_all_data() -> None:
    learner, shard = prepared(job())
    tensors = learner.initial()
    parts = [shard.select([0, 3, 4]), shard.select([1, 2]), shard.select([5, 6, 7])]
    over_clients = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    together = learner.compute(learner.evaluate(tensors, shard))
    assert over_clients["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert {m: over_clients[m] for m in ("mean_iou", "dice")} == {
        m: together[m] for m in ("mean_iou", "dice")
    }


def test_training_beats_the_untrained_network() -> None:
    lraspp = {"name": "torchvision:lraspp_mobilenet_v3_large", "weights": "random", "image_size": 64}
    many = {"lr": 0.002, "batch_size": 4, "optimizer": "adam", "epochs": 8}
    learner, shard = prepared(job(backbone=lraspp, train=many))
    before = learner.initial()
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    after = {name: before[name] + delta for name, delta in update.delta.items()}
    untrained, trained = (learner.compute(learner.evaluate(t, shard)) for t in (before, after))
    assert trained["mean_iou"] > untrained["mean_iou"] + 0.2
    assert trained["loss"] < untrained["loss"]


@pytest.mark.parametrize(
    ("name", "own"), [("deeplabv3_resnet50", 520), ("lraspp_mobilenet_v3_large", 520), ("other", 128)]
)
def test_without_a_size_pictures_are_as_large_as_the_networks_own(name: str, own: int) -> None:
    network = f"torchvision:{name}" if name != "other" else "atoll:small-segmenter"
    learner, shard = prepared(job(backbone={"name": network, "weights": "random"}), 1)
    assert shard.targets_of([0]).shape == (1, own, own)
    words = f"pictures resized to {own} x {own}, the network's own size (backbone.image_size says another)"
    assert learner.task.inputs_description == words
    assert prepared(job(), 1)[0].task.inputs_description == "pictures resized to 32 x 32"


def test_weights_of_other_classes_leave_the_last_layers_fresh(tmp_path: Path) -> None:
    from torchvision import models

    published = models.get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    torch.save(published.state_dict(), tmp_path / "w.pth")
    given = {"name": "torchvision:deeplabv3_mobilenet_v3_large", "weights": str(tmp_path / "w.pth")}
    learner, _ = prepared(job("head", backbone=given))
    own = learner.model.backbone.model.state_dict()
    assert own["classifier.4.weight"].shape[0] == 2
    assert torch.equal(own["classifier.1.weight"], published.state_dict()["classifier.1.weight"])


@pytest.mark.parametrize(
    ("head", "trained", "adapted"), [(None, {"4"}, False), ("lora", {"4"}, True), ("trained", None, False)]
)
def test_under_lora_a_head_for_other_classes_trains_the_layer_that_is_fresh(
    tmp_path: Path, head: str | None, trained: set[str] | None, adapted: bool
) -> None:
    """What DeepLab's pyramid of dilated convolutions has learnt stays, and doesn't travel: 64 MB of it."""
    from torchvision import models

    name = "deeplabv3_mobilenet_v3_large"
    published = models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
    torch.save(published.state_dict(), tmp_path / "w.pth")
    given = {"name": f"torchvision:{name}", "weights": str(tmp_path / "w.pth"), "image_size": 32}
    learner, _ = prepared(job("lora", backbone=given, tune={"method": "lora", "rank": 2, "head": head}), 1)
    names = [n.partition(".classifier.")[2] for n in learner.initial() if ".classifier." in n]
    plain = {n.split(".")[0] for n in names if "lora" not in n}
    assert plain == (trained or {n.split(".")[0] for n, _ in published.classifier.named_parameters()})
    assert any("lora" in n for n in names) == adapted


def test_a_backbone_of_another_kind_is_refused() -> None:
    learner, _ = prepared(job(name="resnet18"))
    with pytest.raises(
        WeightsError, match="is no segmentation model, expected one of atoll:small-segmenter, torch"
    ):
        _ = learner.model


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"augment": ["flip"]}}, "train.augment: segmentation has no augmentations"),
        (
            {"data": {"source": "./here", "classes": ["a", "b"]}},
            "data.classes: expected the classes of pixels",
        ),
        ({"tune": {"hidden": 8}}, "tune.hidden: segmentation has its head inside"),
    ],
)
def test_what_there_is_not_is_refused(tables: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SEGMENTATION.check(job("head", **tables))
