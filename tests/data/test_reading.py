"""Every layout gives the same table, and keys depend on content alone."""

import csv
import hashlib
import json
import stat
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atoll.data.classification import Table, example_keys, inspect, read_images, read_texts
from atoll.data.columns import DEFAULT_COLUMNS, Columns
from atoll.data.dataset import Dataset
from atoll.data.images import decode_image, image_bytes
from atoll.data.labels import class_name
from atoll.data.writers import write_images
from atoll.errors import ConfigError, DataError

TEXTS = [("a goal", "sport"), ("a film", "art"), ("one more goal", "sport")]


def class_folders(root: Path, rows: list[tuple[str, str]] = TEXTS) -> Path:
    for index, (text, label) in enumerate(rows):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{index}.txt").write_text(text, encoding="utf-8")
    return root


def csv_file(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *TEXTS])
    return path


def json_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in TEXTS), encoding="utf-8")
    return path


def parquet(path: Path) -> Path:
    texts, labels = zip(*TEXTS, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return path


def saved(path: Path) -> Path:
    texts, labels = zip(*TEXTS, strict=True)
    data = datasets.Dataset.from_dict({"text": texts, "label": labels}).class_encode_column("label")
    data.save_to_disk(path)
    return path


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour(value: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (value, 10, 20))


def image_folders(root: Path) -> Path:
    for name, label in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{name}.png").write_bytes(encoded(colour(ord(name))))
    return root


def pairs(table: Table) -> set[tuple[str, str]]:
    return set(zip(table.train["text"], table.train["label"], strict=True))


def snapshot(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


LAYOUTS = {
    "class folders": lambda root: class_folders(root / "d"),
    "CSV": lambda root: csv_file(root / "d.csv"),
    "TSV": lambda root: csv_file(root / "d.tsv", "\t"),
    "JSON Lines": lambda root: json_lines(root / "d.jsonl"),
    "Parquet": lambda root: parquet(root / "d.parquet"),
    "a saved dataset": lambda root: saved(root / "d"),
    "a folder with one file": lambda root: csv_file(root / "d.csv").parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_texts_labels_and_keys(tmp_path, layout):
    table = read_texts(LAYOUTS[layout](tmp_path), Columns())
    assert pairs(table) == set(TEXTS)
    assert table.test is None
    reference = pa.Table.from_pylist([{"text": text, "label": label} for text, label in TEXTS])
    assert sorted(example_keys(table.train)) == sorted(example_keys(Dataset(reference)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_writes_nothing_beside_the_data(tmp_path, layout):
    path = LAYOUTS[layout](tmp_path)
    before = snapshot(tmp_path)
    assert len(list(read_texts(path).train.select([2, 0]))) == 2
    assert snapshot(tmp_path) == before


def test_a_read_only_folder_is_read(tmp_path):
    root = class_folders(tmp_path / "d")
    for path in [*root.rglob("*"), root]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    assert pairs(read_texts(root)) == set(TEXTS)


def test_train_and_test_folders_give_both_splits(tmp_path):
    class_folders(tmp_path / "d" / "train")
    class_folders(tmp_path / "d" / "test", [("another film", "art")])
    table = read_texts(tmp_path / "d")
    assert pairs(table) == set(TEXTS)
    assert table.test is not None and list(table.test) == [{"text": "another film", "label": "art"}]


def test_train_and_test_files_give_both_splits_and_parts_are_joined(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        parquet(tmp_path / f"{name}.parquet")
    table = read_texts(tmp_path)
    assert table.train.num_rows == 6
    assert table.test is not None and table.test.num_rows == 3
    assert any("content of a training example" in note for note in table.notes)


def test_a_saved_dataset_dict_gives_both_splits_and_says_what_it_leaves_out(tmp_path):
    part = datasets.Dataset.from_dict({"text": ["x", "y"], "label": ["1", "2"]})
    datasets.DatasetDict({"train": part, "test": part, "validation": part}).save_to_disk(tmp_path / "d")
    table = read_texts(tmp_path / "d")
    assert table.test is not None and table.test.num_rows == 2
    assert any("split validation is not used" in note for note in table.notes)


def test_rows_of_folders_come_in_order_of_their_paths(tmp_path):
    rows = [(f"text {number}", "ba"[number % 2]) for number in range(20)]
    table = read_texts(class_folders(tmp_path, rows))
    assert table.train["label"] == ["a"] * 10 + ["b"] * 10
    assert table.train["text"][:3] == ["text 1", "text 11", "text 13"]


def test_quoted_newlines_and_commas_stay_in_the_text(tmp_path):
    (tmp_path / "d.csv").write_bytes(b'text,label\n"a, b\nc ""d""",x\ne,y\n')
    assert read_texts(tmp_path / "d.csv").train["text"] == ['a, b\nc "d"', "e"]


def test_a_text_in_a_csv_may_be_longer_than_the_csv_module_allows(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "d.csv").write_text("text,label\n" + "x" * 500_000 + ",y\n")
    assert len(read_texts(tmp_path / "d.csv").train[0]["text"]) == 500_000
    assert csv.field_size_limit() == limit


def test_a_shard_may_be_named_by_a_link_to_its_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.csv").symlink_to(csv_file(tmp_path / "elsewhere" / "d.csv"))
    assert pairs(read_texts(tmp_path / "link.csv")) == set(TEXTS)


def test_natural_keys_are_kept_and_lists_are_dropped_with_a_note(tmp_path):
    row = {"review": "good", "stars": 5, "user": "u1", "tokens": ["good"], "category": "+"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "category": "-"}))
    table = read_texts(tmp_path / "d.jsonl")
    assert table.train[0] == {"text": "good", "label": "+", "stars": 5, "user": "u1"}
    assert any("'tokens'" in note for note in table.notes)


def test_named_columns_win_over_usual_names(tmp_path):
    (tmp_path / "d.csv").write_text("text,body,label,kind\na,b,c,d\n")
    table = read_texts(tmp_path / "d.csv", Columns(text="body", label="kind"))
    assert table.train[0]["text"] == "b" and table.train[0]["label"] == "d"


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        ("text,review,label", r"\['text', 'review'\] could each be the text"),
        ("words,label", r"columns \['words', 'label'\], expected one for the text"),
        ("text,kind", "expected one for the label"),
    ],
)
def test_a_column_that_is_absent_or_ambiguous_is_an_error_that_lists_the_columns(tmp_path, header, pattern):
    (tmp_path / "d.csv").write_text(f"{header}\n" + ",".join("xyz"[: header.count(",") + 1]) + "\n")
    with pytest.raises(DataError, match=pattern):
        read_texts(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (3, "3"),
        (3.0, "3"),
        ("3.0", "3"),
        ("03.0", "3"),
        ("007", "007"),
        (True, "true"),
        (" é ", "é"),
        ("2e", "2e"),
    ],
)
def test_equal_labels_get_one_name_however_they_are_written(value, name):
    assert class_name(value, "here") == name


def test_class_indices_get_their_names_so_that_their_order_cannot_matter(tmp_path):
    for site, names in (("one", ["art", "sport"]), ("two", ["sport", "art"])):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = {"text": ["a film", "a goal"], "label": ["art", "sport"]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / site)
    one, two = (read_texts(tmp_path / site).train for site in ("one", "two"))
    assert list(one) == list(two)


def test_images_in_folders_stay_files_until_they_are_used(tmp_path):
    table = read_images(image_folders(tmp_path))
    assert table.train["label"] == ["cat", "cat", "dog"]
    assert table.train[0]["image"]["bytes"] is None
    assert decode_image(image_bytes(table.train[0]["image"]), "a").getpixel((0, 0)) == (ord("a"), 10, 20)


def test_images_listed_in_a_csv_are_found_beside_it(tmp_path):
    image_folders(tmp_path / "pictures")
    (tmp_path / "d.csv").write_text("path,label,site\npictures/cat/a.png,cat,s1\npictures/dog/b.png,dog,s2\n")
    table = read_images(tmp_path)
    assert table.train["label"] == ["cat", "dog"] and table.train["site"] == ["s1", "s2"]
    assert image_bytes(table.train[1]["image"]) == (tmp_path / "pictures/dog/b.png").read_bytes()


@pytest.mark.parametrize("form", ["saved", "struct", "binary"])
def test_images_inside_arrow_files_are_kept_as_bytes(tmp_path, form):
    data = [encoded(colour(value)) for value in (1, 2)]
    images = [{"bytes": value, "path": "x.png"} for value in data] if form != "binary" else data
    if form == "saved":
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["n", "y"])}
        )
        datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features).save_to_disk(
            tmp_path / "d"
        )
    else:
        pq.write_table(pa.table({"image": images, "label": ["n", "y"]}), tmp_path / "d.parquet")
    table = read_images(tmp_path / "d" if form == "saved" else tmp_path / "d.parquet")
    assert [image_bytes(row["image"]) for row in table.train] == data
    assert table.train["label"] == ["n", "y"]


def test_mapped_images_are_not_copied_into_memory(tmp_path):
    data = encoded(colour(1)) + bytes(1_000_000)
    images = [{"bytes": data, "path": None}] * 50
    pq.write_table(pa.table({"image": images, "label": list("xy") * 25}), tmp_path / "d.parquet")
    before = pa.total_allocated_bytes()
    table = read_images(tmp_path / "d.parquet")
    assert table.train.num_rows == 50 and pa.total_allocated_bytes() - before < 5_000_000


def test_writing_a_table_of_image_files_takes_their_bytes_along(tmp_path):
    table = read_images(image_folders(tmp_path / "d"))
    write_images(table.train, tmp_path / "copy", DEFAULT_COLUMNS)
    for path in (tmp_path / "d").rglob("*.png"):
        path.unlink()
    assert read_images(tmp_path / "copy").train.num_rows == 3


def test_keys_of_images_do_not_depend_on_where_they_lie(tmp_path):
    folder = read_images(image_folders(tmp_path / "d")).train
    write_images(folder, tmp_path / "copy", DEFAULT_COLUMNS)
    assert sorted(example_keys(read_images(tmp_path / "copy").train)) == sorted(example_keys(folder))


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=6), st.randoms())
@settings(max_examples=30, deadline=None)
def test_keys_follow_their_examples_into_any_order(rows, random):
    shuffled = random.sample(rows, len(rows))
    keys = dict(zip(rows, keys_of(rows), strict=True))
    assert keys_of(shuffled) == [keys[row] for row in shuffled]


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
@settings(max_examples=50, deadline=None)
def test_two_examples_share_a_key_only_if_they_are_equal(one, other):
    first, second = keys_of([one, other])
    assert (first == second) == (one == other)


def keys_of(rows: list[tuple[str, str]]) -> list[bytes]:
    texts, labels = zip(*rows, strict=True)
    return example_keys(Dataset(pa.table({"text": texts, "label": labels})))


def test_a_key_is_a_hash_of_length_content_and_label():
    expected = hashlib.sha256((2).to_bytes(8, "little") + b"hix").digest()
    assert keys_of([("hi", "x")]) == [expected]


def test_findings_count_classes_sizes_and_repeats(tmp_path):
    found = inspect(class_folders(tmp_path, [*TEXTS, ("a goal", "art")]), "text-classification")
    assert found.train == {"art": 2, "sport": 2}
    assert (found.bad, found.problems, found.duplicates) == (0, (), 1)
    assert found.sizes == "6 characters to 13 characters, half of them up to 6 characters"
    assert any("more than one label" in note for note in found.notes)


def test_findings_list_twenty_bad_files_and_count_them_all(tmp_path):
    root = image_folders(tmp_path)
    for number in range(25):
        (root / "cat" / f"bad{number}.png").write_bytes(b"no image")
    found = inspect(root, "image-classification")
    assert found.bad == 25 and len(found.problems) == 20
    assert found.train == {"cat": 2, "dog": 1} and found.sizes.startswith("6 x 4 pixels")
    with pytest.raises(DataError, match="the first of 25 bad examples"):
        read_images(root)


def test_an_unknown_task_cannot_be_inspected(tmp_path):
    with pytest.raises(ConfigError, match="expected one of text-classification"):
        inspect(tmp_path, "text")


def grey_16(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((2, 2), value, np.uint16)))


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(Image.new("1", (2, 2), 1)), (255, 255, 255)),
        (encoded(Image.new("L", (2, 2), 7)), (7, 7, 7)),
        # A quarter of black over white: 255 * 3/4 = 191.25.
        (encoded(Image.new("LA", (2, 2), (0, 64))), (191, 191, 191)),
        (encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0))), (255, 255, 255)),
        (encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255)),
        (encoded(Image.new("P", (2, 2), 0)), (0, 0, 0)),
        (encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        # The high byte: 0x1234 to 0x12, whatever else is in the image.
        (grey_16(0x1234), (0x12, 0x12, 0x12)),
        (encoded(Image.fromarray(np.full((2, 2), 0xFFFF, np.int32)), "TIFF"), (255, 255, 255)),
        # 0.5 * 255 = 127.5, to even.
        (encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
    ],
    ids=["1", "L", "LA", "RGBA", "transparent colour", "P", "CMYK", "I;16", "I", "F"],
)  # fmt: skip
def test_every_mode_becomes_rgb_by_its_fixed_rule(data, pixel):
    image = decode_image(data, "x")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == pixel


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_exif_orientation_is_applied(mode, orientation, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    drawn, exif = Image.fromarray(pixels).convert(mode), Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(drawn, "PNG", exif=exif), "x")
    upright = drawn if turned is None else drawn.transpose(turned)
    assert np.array_equal(np.asarray(found), np.asarray(upright.convert("RGB")))
