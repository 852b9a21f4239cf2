"""The data that packages carry are what they are known to be."""

import datetime
from collections import Counter

import pyarrow as pa
import pytest

from protocol.errors import DataError
from tasks.packaged import movielens_100k, sp500


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
