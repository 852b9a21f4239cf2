"""Generated deliveries have seasons and causes, and generated customers have tastes and habits."""

import datetime
from collections import Counter
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from atoll.datasets.synthetic.tables.deliveries import DAYS, DISTRICTS, TEST_DAYS, generated_deliveries
from atoll.datasets.synthetic.tables.shop import CATEGORIES, generated_shop


@cache
def deliveries() -> dict[str, pa.Table]:
    return generated_deliveries()


@cache
def shop() -> dict[str, pa.Table]:
    return generated_shop()


def rows(splits: dict[str, pa.Table]) -> list[dict]:
    return pa.concat_tables(splits.values()).to_pylist()


def district(name: str) -> dict[str, np.ndarray]:
    """Its columns over all days."""
    own = sorted((row for row in rows(deliveries()) if row["series"] == name), key=lambda row: row["date"])
    return {column: np.array([row[column] for row in own]) for column in own[0]}


@pytest.mark.parametrize("make", [generated_deliveries, generated_shop])
def test_a_seed_gives_the_same_rows_and_another_gives_others(make):
    assert rows(make(3)) == rows(make(3)) != rows(make(4))


# Deliveries


def test_every_district_has_every_day_and_the_test_split_comes_last():
    assert deliveries()["train"].num_rows == 12 * (DAYS - TEST_DAYS)
    assert deliveries()["test"].num_rows == 12 * TEST_DAYS
    first = datetime.date(2021, 1, 1)
    expected = [(first + datetime.timedelta(days=day)).isoformat() for day in range(DAYS)]
    assert all(district(name)["date"].tolist() == expected for name in DISTRICTS)
    assert max(deliveries()["train"]["date"].to_pylist()) < min(deliveries()["test"]["date"].to_pylist())


def test_numbers_are_those_of_weather_and_deliveries():
    for row in rows(deliveries()):
        assert 5 < row["value"] < 120 and 0 <= row["rain"] < 60 and -25 < row["temperature"] < 40
        assert 0.2 <= row["traffic"] < 2 and row["holiday"] in (0, 1)


@pytest.mark.parametrize("name", DISTRICTS)
def test_weekdays_seasons_rain_and_traffic_show_in_the_minutes(name):
    own = district(name)
    days = [datetime.date.fromisoformat(date) for date in own["date"].tolist()]
    weekday, month = np.array([d.weekday() for d in days]), np.array([d.month for d in days])
    assert own["value"][weekday == 4].mean() > own["value"][weekday == 6].mean() + 5
    assert own["temperature"][month == 7].mean() > own["temperature"][month == 1].mean() + 12
    assert own["holiday"].sum() == 3 * 8
    # Each cause by itself: next to the weekday, the season, the holidays and the trend.
    usual = [weekday == day for day in range(7)]
    yearly = 2 * np.pi * (np.arange(DAYS) - 15) / 365.25
    others = [*usual, np.cos(yearly), own["holiday"], np.arange(DAYS)]
    causes = np.column_stack([own["rain"], own["traffic"], *others]).astype(float)
    (rain, traffic, *_), *_ = np.linalg.lstsq(causes, own["value"], rcond=None)
    assert 0.3 < rain < 1 and 8 < traffic < 20


def test_last_week_is_a_better_forecast_than_yesterday():
    # That there is something to learn: the season is seen in the errors of naive forecasts.
    values = [district(name)["value"] for name in DISTRICTS]
    yesterday = np.mean([np.abs(v[7:] - v[6:-1]).mean() for v in values])
    last_week = np.mean([np.abs(v[7:] - v[:-7]).mean() for v in values])
    assert last_week < 0.8 * yesterday


# The shop


def histories() -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows(shop()):
        found.setdefault(row["user"], []).append(row)
    return found


def test_eight_hundred_users_of_ten_shops_buy_two_hundred_items():
    bought = rows(shop())
    assert len({row["user"] for row in bought}) == 800 and len({row["shop"] for row in bought}) == 10
    items = {row["item"]: (row["item_text"], row["category"]) for row in bought}
    assert len(items) == 200 == len(set(items.values()))
    assert {category for _, category in items.values()} == set(CATEGORIES) and len(CATEGORIES) == 12
    assert all(text.split(" ", 1)[1] in CATEGORIES[category] for text, category in items.values())


def test_a_history_has_one_shop_goes_forward_in_time_and_repeats_nothing():
    for own in histories().values():
        assert 8 <= len(own) <= 30
        assert len({row["shop"] for row in own}) == 1
        assert len({row["item"] for row in own}) == len(own)
        times = [row["time"] for row in own]
        assert times == sorted(set(times))


def test_test_users_are_others_of_the_same_shops():
    train, test = (shop()[name] for name in ("train", "test"))
    assert not set(train["user"].to_pylist()) & set(test["user"].to_pylist())
    assert set(train["shop"].to_pylist()) == set(test["shop"].to_pylist())
    assert len(set(test["user"].to_pylist())) == 120


def test_what_was_bought_last_tells_what_comes_next_better_than_what_sells():
    pairs: dict[str, Counter[str]] = {}
    sold: Counter[str] = Counter(shop()["train"]["item"].to_pylist())
    trained = set(shop()["train"]["user"].to_pylist())
    users = histories()
    for user in trained:
        for last, following in zip(users[user], users[user][1:], strict=False):
            pairs.setdefault(last["item"], Counter())[following["item"]] += 1
    best = {item for item, _ in sold.most_common(10)}
    by_pairs = by_sales = 0
    tested = [own for user, own in users.items() if user not in trained]
    for own in tested:
        held_out = own[-1]["item"]
        by_pairs += held_out in {i for i, _ in pairs.get(own[-2]["item"], Counter()).most_common(10)}
        by_sales += held_out in best
    assert by_pairs / len(tested) > 0.5 > 2 * by_sales / len(tested)


def test_shops_sell_different_things():
    shares = {}
    for row in rows(shop()):
        shares.setdefault(row["shop"], Counter())[row["category"]] += 1
    top = {own.most_common(1)[0][0] for own in shares.values()}
    assert len(top) >= 4
