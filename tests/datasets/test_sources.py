"""The named data sets are what they say, and come from the cache the second time."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from atoll.data.classification import Table, table_of
from atoll.data.images import decode_image, image_bytes
from atoll.datasets.registry import SOURCES, Source, _generator_hash, load_source
from atoll.datasets.synthetic.png import grey_png
from atoll.errors import ConfigError, DataError

pytestmark = pytest.mark.processes  # pip fetches what no cache has yet


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def loaded(name: str) -> Table:
    try:
        return table_of(load_source(name))
    except DataError as error:
        pytest.skip(str(error))


def pixels(table: Table, row: int) -> np.ndarray:
    return np.asarray(decode_image(image_bytes(table.train[row]["image"]), "x"))[:, :, 0]


@pytest.mark.processes
def test_bbc_news_has_its_articles_and_topics():
    table = loaded("bbc-news")
    counts = {label: table.train["label"].count(label) for label in set(table.train["label"])}
    assert counts == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}


def test_the_one_article_in_latin_1_keeps_its_pound_sign():
    texts = loaded("bbc-news").train["text"]
    assert sum("£15.8m signing from" in text for text in texts) >= 1
    assert not any(
        "\ufffd" in text or "\x80" <= char < "\xa0" for text in texts for char in text if char > "\x7f"
    )


@pytest.mark.processes
def test_mnist_5k_is_upright_and_balanced():
    table = loaded("mnist-5k")
    assert table.train.num_rows == 5000 and table.train["label"].count("6") == 500
    six = pixels(table, table.train["label"].index("6"))
    assert six.shape == (28, 28)
    # A 6 has its loop, so most of its ink, below; a 9 above.
    assert six[14:].sum() > six[:14].sum()


def test_digits_use_the_whole_range_of_grey():
    table = loaded("digits")
    assert table.train.num_rows == 1797
    # The first digit's first row is 0 0 5 13 9 1 0 0 of 16: 5 * 255 / 16 = 79.7
    assert pixels(table, 0)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_fashion_mnist_has_its_own_test_split():
    table = loaded("fashion-mnist")
    assert table.test is not None
    assert (table.train.num_rows, table.test.num_rows) == (60_000, 10_000)
    assert table.train[0]["label"] == "Ankle boot" and table.train["label"][:1000].count("Bag") > 50


@pytest.mark.processes
def test_tree_crowns_lie_in_their_squares_and_are_counted_once():
    try:
        rows = load_source("tree-crowns")["train"].to_pylist()
    except DataError as error:
        pytest.skip(str(error))
    assert len(rows) == 413 and {row["site"] for row in rows} == {"yell", "osbs", "soap"}
    boxes = np.array([box for row in rows for box in row["boxes"]])
    # 951 crowns in all; those at the right and lower edges are in no whole square.
    assert 700 < len(boxes) <= 951 and len({tuple(box) for box in boxes.tolist()}) > 700
    assert (boxes >= 0).all() and (boxes <= 128).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    wooded = [np.asarray(decode_image(image_bytes(row["image"]), "x")) for row in rows if row["boxes"]]
    assert all(picture.shape == (128, 128, 3) for picture in wooded)


@pytest.mark.parametrize("name", ["bbc-news", "mnist-5k", "digits"])
def test_a_second_load_decodes_nothing_and_is_equal(name, monkeypatch):
    first = loaded(name)

    def decode_again(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("atoll.datasets.registry._write", decode_again)
    second = table_of(load_source(name, offline=True))
    assert second.train[:50] == first.train[:50] and second.notes == first.notes


def test_a_damaged_cache_says_what_to_remove(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path))
    load_source("digits")
    (tmp_path / "sources" / "digits-1" / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"train.parquet: damaged: .*remove .*digits-1"):
        load_source("digits")


def test_what_is_generated_anew_is_not_taken_from_an_older_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path))
    older = Source("generated-shapes", (), "", "", lambda *_: {"train": pa.table({"a": [1]})}, lambda: "old")
    newer = replace(older, decode=lambda *_: {"train": pa.table({"a": [2]})}, edition=lambda: "new")
    for source, value in ((older, 1), (newer, 2), (older, 1)):
        monkeypatch.setitem(SOURCES, "generated-shapes", source)
        assert load_source("generated-shapes")["train"]["a"].to_pylist() == [value]
    assert _generator_hash() == _generator_hash() != "1"


def test_an_unknown_source_suggests_the_nearest():
    with pytest.raises(ConfigError, match="'bbc-new': did you mean 'bbc-news'"):
        load_source("bbc-new")


def test_every_source_states_its_terms():
    assert all(source.licence and source.description for source in SOURCES.values())


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (300, 400)])
def test_a_stored_png_decodes_to_its_pixels(shape):
    expected = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (np.asarray(decode_image(grey_png(expected), "x"))[:, :, 0] == expected).all()
