"""Grey pictures of more than 8 bits: what decoding loses is remarked, and the job says how they are seen."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from atoll.backbones.resolve import Backbone
from atoll.cli.main import app
from atoll.data.images import image_bytes
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.learning.compatibility import check_fits
from atoll.tasks import task_named
from tests.support.small import image_job

TASKS = ("image-classification", "medical-imaging")
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def pictures(folder: Path, values: Any, suffix: str = "png") -> Path:
    """A class folder each with a picture, the second one darker by a value."""
    for name, picture in (("a", values), ("b", np.maximum(values, 1) - 1)):
        (folder / name).mkdir(parents=True)
        Image.fromarray(picture).save(folder / name / f"0.{suffix}")
    return folder


def seen(cell: Any) -> np.ndarray[Any, Any]:
    """The grey values in a cell of a table."""
    with Image.open(BytesIO(image_bytes(cell))) as image:
        assert image.mode == "L"
        return np.asarray(image)


def read(task: str, folder: Path, **data: Any) -> Any:
    return task_named(task).read(folder, DataSection(source=str(folder), **data), {})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("values", "data", "expected"),
    [
        (RAMP, {"bits": 8}, RAMP),
        (RAMP * 16, {"bits": 12}, RAMP),
        (RAMP * 16 + 15, {"bits": 12}, RAMP),
        (RAMP * 256, {"bits": 16}, RAMP),
        (RAMP + 1000, {"window": (1000, 1255)}, RAMP),
        (RAMP * 2, {"window": (0, 255)}, np.minimum(RAMP * 2, 255)),
    ],
)
def test_bits_and_windows_give_the_values_that_they_say(
    tmp_path: Path, task: str, values: Any, data: dict[str, Any], expected: Any
) -> None:
    table = read(task, pictures(tmp_path / "d", values.astype(np.uint16)), **data)
    np.testing.assert_array_equal(seen(table.train["image"][0]), expected)
    assert not table.notes


def test_a_window_reads_floats_and_negative_integers(tmp_path: Path) -> None:
    for kind, values in (("f", RAMP.astype(np.float32) - 100), ("i", RAMP.astype(np.int32) - 100)):
        folder = pictures(tmp_path / kind, values, "tif")
        table = read("medical-imaging", folder, window=(-100.0, 155.0))
        np.testing.assert_array_equal(seen(table.train["image"][0]), RAMP)
        with pytest.raises(DataError, match="expected 0 to"):
            read("medical-imaging", folder)


@pytest.mark.parametrize("task", TASKS)
def test_check_remarks_what_is_lost_and_pictures_of_one_colour(tmp_path: Path, task: str) -> None:
    folder = pictures(tmp_path / "d", (RAMP * 16).astype(np.uint16))
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "a" / "flat.png")
    said = CliRunner().invoke(app, ["check", str(folder), "--task", task]).stdout
    assert "a/0.png, 256 values from 0 to 4080 become 16 and 1 more" in said
    assert "pictures of one colour: " in said and "flat.png" in said
    said = CliRunner().invoke(app, ["check", str(folder), "--task", task, "--bits", "12"]).stdout
    assert "few grey values" not in said and "ready" in said


def test_values_that_the_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", (RAMP * 16).astype(np.uint16))
    with pytest.raises(DataError, match=r"0\.png: values from 0 to 4080, expected whole ones from 0 to 255"):
        read("image-classification", folder, bits=8)


def test_pictures_of_8_bits_stay_as_they_are(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", RAMP.astype(np.uint8))
    cell = read("image-classification", folder, bits=12).train["image"][0]
    assert image_bytes(cell) == (folder / "a" / "0.png").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_what_is_predicted_on_is_seen_alike(tmp_path: Path, task: str) -> None:
    folder = pictures(tmp_path / "d", (RAMP * 16).astype(np.uint16))
    data = {"source": str(folder), "bits": 12}
    job = image_job("squeezenet1_1", data=data, task={"name": task})
    backbone = Backbone("torchvision", "squeezenet1_1", "", None, None, "")
    bound = task_named(task).configured(job, backbone)
    given = bound.parse_input(str(folder / "a" / "0.png"))
    np.testing.assert_array_equal(seen({"bytes": given, "path": None}), RAMP)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"bits": 12, "window": [0, 5]}, "bits and window exclude each other"),
        ({"window": [5, 5]}, "low below high"),
        ({"bits": 4}, "bits"),
    ],
)
def test_a_depth_that_makes_no_sense_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        image_job("squeezenet1_1", data={"source": "digits"} | data)


def test_texts_have_no_depth() -> None:
    table = {
        "name": "texts",
        "seed": 1,
        "task": {"name": "text-classification"},
        "data": {"source": "bbc-news", "bits": 12},
        "backbone": {"name": "hf:all-MiniLM-L6-v2"},
        "federation": {"clients": 2},
    }
    with pytest.raises(ConfigError, match=r"data\.bits: text-classification reads no pictures"):
        check_fits(Job.parse(table, origin="test"), task_named("text-classification"))
