"""Generated images are the same twice, and boxes, masks and pixels agree."""

import hashlib
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from atoll.data.images import decode_image, image_bytes
from atoll.datasets.synthetic.drawing import SIDE, box_of, ellipse, rectangle, triangle
from atoll.datasets.synthetic.png import rgb_png
from atoll.datasets.synthetic.scans import HOSPITALS, generated_scans
from atoll.datasets.synthetic.shapes import MASK_CLASSES, SHAPES, generated_shapes
from atoll.datasets.synthetic.street import MASK_CLASSES as STREET_CLASSES
from atoll.datasets.synthetic.street import OBJECTS, WEATHER, generated_street

MADE = ("generated_shapes", "generated_street")


@cache
def made(name: str) -> dict[str, pa.Table]:
    return {make.__name__: make for make in (generated_shapes, generated_street)}[name]()


@cache
def rows(name: str) -> list[dict]:
    return pa.concat_tables(made(name).values()).to_pylist()


def pixels(cell: dict) -> np.ndarray:
    return np.asarray(decode_image(image_bytes(cell), "x"))


def digest(splits: dict[str, pa.Table]) -> str:
    told = repr([(name, table.to_pylist()) for name, table in splits.items()])
    return hashlib.sha256(told.encode()).hexdigest()


@pytest.mark.parametrize("make", [generated_shapes, generated_street, generated_scans])
def test_a_seed_gives_the_same_bytes_and_another_gives_others(make):
    assert digest(make(3, 20)) == digest(make(3, 20)) != digest(make(4, 20))


@pytest.mark.parametrize("name", MADE)
def test_there_are_480_images_for_training_and_120_for_test_all_different(name):
    assert [table.num_rows for table in made(name).values()] == [480, 120]
    assert len({image_bytes(row["image"]) for row in rows(name)}) == 600


@pytest.mark.parametrize("name", MADE)
def test_every_image_has_one_to_four_boxes_inside_it(name):
    counts = [0] * 5
    for row in rows(name):
        counts[len(row["boxes"])] += 1
        assert len(row["boxes"]) == len(row["classes"])
        for x1, y1, x2, y2 in row["boxes"]:
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE
            assert x2 - x1 >= 4 and y2 - y1 >= 4
    assert counts[0] == 0 and all(count > 50 for count in counts[1:])


@pytest.mark.parametrize(("name", "classes"), [("generated_shapes", SHAPES), ("generated_street", OBJECTS)])
def test_every_class_is_about_as_frequent(name, classes):
    found = [c for row in rows(name) for c in row["classes"]]
    assert set(found) == set(classes)
    assert all(found.count(c) > 0.2 * len(found) for c in classes)


def test_a_mask_has_each_shape_in_its_box_and_nothing_outside():
    for row in rows("generated_shapes"):
        mask = pixels(row["mask"])[:, :, 0]
        rest = mask.copy()
        for (x1, y1, x2, y2), name in zip(row["boxes"], row["classes"], strict=True):
            inside = mask[int(y1) : int(y2), int(x1) : int(x2)] == MASK_CLASSES.index(name)
            # Pixels of the shape touch each side of its box.
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            # A square fills its box, a circle pi / 4 of it, a triangle half.
            share = {"square": 1, "circle": np.pi / 4, "triangle": 0.5}[name]
            assert inside.mean() == pytest.approx(share, abs=0.09)
            rest[int(y1) : int(y2), int(x1) : int(x2)] = 0
        assert not rest.any()


def test_a_shape_differs_from_the_ground_where_its_mask_says():
    for row in rows("generated_shapes")[:100]:
        image, mask = pixels(row["image"]).astype(float), pixels(row["mask"])[:, :, 0]
        ground = image[mask == 0].mean(axis=0)
        # Noise of 14 on each of three channels is 24 away from the ground, the shape at least 90.
        for value in set(mask.ravel().tolist()) - {0}:
            distance = np.linalg.norm(image[mask == value] - ground, axis=1)
            assert distance.mean() > 70
        assert np.linalg.norm(image[mask == 0] - ground, axis=1).mean() < 30


def test_a_streets_mask_has_its_objects_in_their_boxes_on_the_road_and_beside_it():
    road = STREET_CLASSES.index("road")
    for row in rows("generated_street"):
        mask = pixels(row["mask"])[:, :, 0]
        assert 0.15 < (mask == road).mean() < 0.6 and not (mask[:30] == road).any()
        rest = mask.copy()
        for (x1, y1, x2, y2), name in zip(row["boxes"], row["classes"], strict=True):
            inside = mask[int(y1) : int(y2), int(x1) : int(x2)] == STREET_CLASSES.index(name)
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            rest[int(y1) : int(y2), int(x1) : int(x2)] = 0
        assert set(np.unique(rest)) <= {0, road}


def test_scans_of_a_patient_agree_and_no_patient_is_in_both_splits():
    splits = generated_scans()
    patients = [set(table["patient"].to_pylist()) for table in splits.values()]
    assert [len(found) for found in patients] == [192, 48] and not patients[0] & patients[1]
    whose = {}
    for row in pa.concat_tables(splits.values()).to_pylist():
        told = (row["label"], row["hospital"])
        assert whose.setdefault(row["patient"], told) == told
    assert {hospital for _, hospital in whose.values()} == set(HOSPITALS)
    assert 0.25 < sum(label == "nodule" for label, _ in whose.values()) / len(whose) < 0.55


def test_weather_can_be_told_by_brightness_and_colour():
    seen = {label: [] for label in WEATHER}
    for row in rows("generated_street"):
        image = pixels(row["image"]).astype(float)
        seen[row["label"]].append((image.mean(), (image.max(axis=2) - image.min(axis=2)).mean()))
    assert all(len(found) > 150 for found in seen.values())
    brightness, colour = (
        {label: np.mean([pair[i] for pair in found]) for label, found in seen.items()} for i in (0, 1)
    )
    assert brightness["night"] < brightness["rain"] < brightness["day"]
    assert colour["rain"] < colour["day"]


def test_a_sign_is_red_and_white_by_day():
    by_day = [row for row in rows("generated_street") if row["label"] == "day"]
    for row in by_day:
        image = pixels(row["image"]).astype(int)
        for (x1, y1, x2, _), name in zip(row["boxes"], row["classes"], strict=True):
            if name == "sign":
                # The disc is as high as it is wide.
                disc = image[int(y1) : int(y1 + x2 - x1), int(x1) : int(x2)]
                assert ((disc[:, :, 0] > 150) & (disc[:, :, 1] < 80)).mean() > 0.3
                assert (disc.min(axis=2) > 180).mean() > 0.1


def test_the_box_of_a_region_by_hand():
    # Pixel centres 2.5..5.5 and 3.5..6.5 lie within 4 by 4 around (4, 5).
    assert box_of(rectangle(4, 5, 4, 4)) == [2, 3, 6, 7]
    assert box_of(ellipse(20, 20, 10, 6)) == [15, 17, 25, 23]
    assert box_of(triangle(30, 30, 10, 10))[1::2] == [26, 35]


@pytest.mark.parametrize("shape", [(1, 1, 3), (200, 150, 3)])
def test_a_stored_colour_png_decodes_to_its_pixels(shape):
    expected = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (np.asarray(decode_image(rgb_png(expected), "x")) == expected).all()
