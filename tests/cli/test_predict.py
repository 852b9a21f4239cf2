"""What `atoll predict` gives: masks, boxes and forecasts as arrays and files, of folders and many inputs."""

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import atoll
from atoll.cli.main import app
from atoll.data.images import decode_image
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.learning.compatibility import required_info
from atoll.learning.learner import Learner
from atoll.protocol.tensors import to_bytes
from atoll.tasks import task_named
from atoll.tasks.drawing import boxes_over, colour_of, mask_over, mask_png
from atoll.tasks.moments import moments_after

SMALL = {"weights": "random", "image_size": 32, "options": {"width": 8}}
STEPS = {"history": 8, "horizon": 3, "season": 2}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "segmentation": (
        {"backbone": SMALL | {"name": "atoll:small-segmenter"}},
        {"classes": ["ground", "square", "disc"]},
    ),
    "object-detection": (
        {"backbone": SMALL | {"name": "atoll:small-detector"}},
        {"classes": ["square", "disc"], "most": 1},
    ),
    "forecasting": (
        {
            "task": {"name": "forecasting", "options": STEPS},
            "backbone": {"name": "atoll:gru", "weights": "random", "options": {"width": 4}},
        },
        {},
    ),
}


def run_of(task: str, folder: Path) -> atoll.Run:
    """A run directory as if it had ended before the first round: the model that it began with."""
    tables, data_info = JOBS[task]
    table = {
        "name": "small",
        "seed": 5,
        "task": {"name": task},
        "data": {"source": "./here"},
        "tune": {"method": "full"},
    } | tables
    learner = Learner.of(Job.parse(table, origin="test"), task_named(task), data_info)
    (folder / "model").mkdir(parents=True)
    (folder / "job.toml").write_text("")
    facts = data_info | required_info(learner)
    (folder / "model" / "model.json").write_text(json.dumps({"job": table, "facts": facts}))
    (folder / "model" / "model.safetensors").write_bytes(to_bytes(learner.initial()))
    return atoll.Run(folder)


def pictures(folder: Path) -> Path:
    """Three pictures, one of them in a folder of its own, and what is none."""
    rng = np.random.default_rng(3)
    for name, size in (("a.png", (40, 30)), ("a.jpg", (20, 50)), ("more/b.png", (16, 16))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder


def say(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["predict", *map(str, arguments)], catch_exceptions=False)
    return found.exit_code, found.output


def test_a_mask_has_the_pictures_own_size_and_is_the_highest_score_at_every_pixel(tmp_path: Path) -> None:
    run, path = run_of("segmentation", tmp_path / "run"), pictures(tmp_path / "in") / "a.png"
    (answer,) = run.predict([path])
    assert answer["mask"].shape == answer["scores"].shape == (30, 40)
    assert (answer["mask"].dtype, answer["scores"].dtype) == (np.uint8, np.float32)
    assert not list(tmp_path.glob("in/*predicted*")), "Python writes files only where it is told to"
    learner, tensors = atoll.trained.trained(run.folder)
    with torch.inference_mode():
        square = learner.filled(tensors)(learner.encoder.preprocess_and_collate([path.read_bytes()]))
    # The oracle: every class' scores resized on their own, then their probabilities compared.
    each = [
        torch.nn.functional.interpolate(square[:, c : c + 1], (30, 40), mode="bilinear") for c in range(3)
    ]
    chances = torch.cat(each, 1)[0].softmax(0).numpy()
    assert np.array_equal(answer["mask"], chances.argmax(0))
    np.testing.assert_allclose(answer["scores"], chances.max(0), rtol=1e-6)
    shares = {
        name: float((answer["mask"] == c).mean()) for c, name in enumerate(JOBS["segmentation"][1]["classes"])
    }
    assert answer["shares"] == pytest.approx({n: s for n, s in shares.items() if s}, abs=1e-4)


def test_a_folder_is_predicted_file_by_file_into_another_one(tmp_path: Path) -> None:
    run, place = run_of("segmentation", tmp_path / "run"), pictures(tmp_path / "in")
    code, printed = say(run.folder, place, "--out", tmp_path / "said", "--overlay")
    assert code == 0 and "3 mask.png, 3 overlay.png" in printed and "said" in printed
    written = sorted(str(p.relative_to(tmp_path / "said")) for p in (tmp_path / "said").rglob("*.png"))
    kinds = ("mask", "overlay")
    assert written == [f"{n}.predicted-{k}.png" for n in ("a.jpg", "a.png", "more/b.png") for k in kinds]
    (answer,) = run.predict([place / "a.png"])
    with Image.open(tmp_path / "said" / "a.png.predicted-mask.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), answer["mask"])
    with Image.open(tmp_path / "said" / "a.png.predicted-overlay.png") as image:
        assert (image.mode, image.size) == ("RGB", (40, 30))


def test_without_a_place_files_are_beside_their_inputs_and_no_inputs_of_the_next_time(tmp_path: Path) -> None:
    run, place = run_of("segmentation", tmp_path / "run"), pictures(tmp_path / "in")
    for _ in range(2):
        code, printed = say(run.folder, place, "--json")
        rows = [json.loads(line) for line in printed.splitlines()]
        assert code == 0 and len(rows) == 3
    assert {"input", "label", "shares", "colours", "files"} == set(rows[0])
    assert all(Path(row["files"]["mask.png"]) == Path(f"{row['input']}.predicted-mask.png") for row in rows)


def test_boxes_are_told_in_pixels_and_drawn(tmp_path: Path) -> None:
    run, path = run_of("object-detection", tmp_path / "run"), pictures(tmp_path / "in") / "a.jpg"
    (answer,) = run.predict([path], tmp_path / "said")
    assert answer["size"] == [20, 50]
    for box in answer["boxes"]:
        assert box["pixels"] == pytest.approx(np.multiply(box["box"], [20, 50, 20, 50]), abs=0.06)
    assert answer["files"] == {"boxes.png": tmp_path / "said" / "a.jpg.predicted-boxes.png"}
    assert decode_image(answer["files"]["boxes.png"].read_bytes(), "drawn").size == (20, 50)


def test_a_box_is_drawn_where_it_is_with_a_tag_above() -> None:
    drawn = boxes_over(
        Image.new("RGB", (200, 100)),
        [{"class": "b", "score": 0.9, "box": [0.25, 0.5, 0.75, 0.9]}],
        ["a", "b"],
    )
    pixels = np.asarray(Image.open(BytesIO(drawn)))
    is_colour = (pixels == colour_of(2)).all(2)
    assert is_colour[50:90, 50].all() and is_colour[50:90, 150].all() and is_colour[90, 50:150].all()
    assert not is_colour[60:85, 60:140].any(), "what is in the box stays visible"
    assert is_colour[40:50, 50:100].any() and not is_colour[:30].any()


def test_a_masks_colours_are_those_of_pascal_voc_and_half_of_the_picture_shows() -> None:
    # The first of VOC's: black, dark red, dark green, olive; 255 is nearly white.
    assert [colour_of(n) for n in (0, 1, 2, 3, 255)] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (224, 224, 192),
    ]  # fmt: skip
    assert len({colour_of(n) for n in range(256)}) == 256
    mask = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    image = Image.open(BytesIO(mask_png(mask)))
    assert np.array_equal(np.asarray(image), mask)
    assert np.asarray(image.convert("RGB"))[0, 1].tolist() == [128, 0, 0]
    over = mask_over(Image.new("RGB", (2, 2), (200, 100, 50)), mask, ["x", "y", "z"])
    assert np.asarray(Image.open(BytesIO(over)))[0, 1].tolist() == [164, 50, 25]


def series(path: Path, *, names: tuple[str, ...] = ("",)) -> Path:
    """Twelve days of each series; the last three have no value."""
    lines = ["series,date,value" if names != ("",) else "date,value"]
    for place, name in enumerate(names):
        for day in range(1, 13):
            cells = [name] if name else []
            lines.append(",".join([*cells, f"2024-03-{day:02d}", "" if day > 9 else str(day + 100 * place)]))
    path.write_text("\n".join(lines))
    return path


def test_a_forecast_is_a_table_with_dates_and_a_plot(tmp_path: Path) -> None:
    run, path = run_of("forecasting", tmp_path / "run"), series(tmp_path / "one.csv")
    code, printed = say(run.folder, path)
    assert code == 0 and "1 forecast.csv, 1 forecast.png: beside the inputs" in printed
    (answer,) = run.predict([path])
    table = list(csv.DictReader((tmp_path / "one.csv.predicted-forecast.csv").open()))
    assert [row["date"] for row in table] == ["2024-03-10", "2024-03-11", "2024-03-12"] == answer["dates"]
    assert [float(row["q0.5"]) for row in table] == answer["quantiles"]["0.5"]
    with Image.open(tmp_path / "one.csv.predicted-forecast.png") as image:
        assert image.size == (960, 480)


def test_a_file_of_many_series_has_a_forecast_for_each(tmp_path: Path) -> None:
    run, path = (
        run_of("forecasting", tmp_path / "run"),
        series(tmp_path / "all.csv", names=("n/a 1", "south")),
    )
    answers = run.predict([path], tmp_path / "said")
    assert [answer["series"] for answer in answers] == ["n/a 1", "south"]
    assert answers[0]["quantiles"] != answers[1]["quantiles"]
    assert sorted(p.name for p in (tmp_path / "said").glob("*.csv")) == [
        "all.csv.n_a_1.predicted-forecast.csv", "all.csv.south.predicted-forecast.csv",
    ]  # fmt: skip


def test_moments_follow_where_their_steps_are_alike() -> None:
    days = [f"2024-03-{day:02d}" for day in range(4, 11)]
    assert moments_after(days, 2) == ["2024-03-11", "2024-03-12"]
    assert moments_after(["2024-01-31", "2024-02-29", "2024-03-31"], 1) == []
    assert moments_after(["5"], 1) == []


def test_files_of_one_name_and_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    run = run_of("segmentation", tmp_path / "run")
    one, other = (pictures(tmp_path / name) / "a.png" for name in ("in", "also"))
    with pytest.raises(
        ConfigError, match=r"--out: .*in/a\.png and .*also/a\.png would have files of one name"
    ):
        run.predict([one, other], tmp_path / "said")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*; expected a place that can be: --out DIR"):
        run.predict([one], tmp_path / "file")
