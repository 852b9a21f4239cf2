"""`generated-deliveries`: minutes that deliveries take, by district and day, with weather and traffic."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.protocol.random_streams import stream_seed

DISTRICTS = (
    "airport", "castle", "east", "harbour", "hills", "market", "north", "old-town", "riverside", "south",
    "university", "west",
)  # fmt: skip
FIRST_DAY = datetime.date(2021, 1, 1)
DAYS = 3 * 365
TEST_DAYS = 219
# Monday first: parcels pile up over the weekend, and Sunday is quiet.
_WEEKDAY_MINUTES = (5.0, 2.0, 0.0, 1.0, 6.0, 1.0, -7.0)
_WEEKDAY_TRAFFIC = (0.15, 0.1, 0.1, 0.12, 0.25, -0.2, -0.4)
_HOLIDAYS = ((1, 1), (1, 6), (5, 1), (8, 15), (10, 3), (11, 1), (12, 25), (12, 26))
_YEAR = 365.25

Floats = NDArray[np.float64]


def generated_deliveries(seed: int = 0) -> dict[str, pa.Table]:
    """A row a district and day: columns series, date, value (minutes), rain (mm), temperature (degrees
    Celsius), traffic (1 is usual) and holiday (0 or 1).

    The last `TEST_DAYS` days of every series are the test split: it begins the day after training ends.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-deliveries"))
    sky = rng.normal(0, 1, DAYS)
    tables = [_series(name, sky, rng) for name in DISTRICTS]
    return {
        "train": pa.concat_tables(table.slice(0, DAYS - TEST_DAYS) for table in tables),
        "test": pa.concat_tables(table.slice(DAYS - TEST_DAYS) for table in tables),
    }


def _series(name: str, sky: Floats, rng: np.random.Generator) -> pa.Table:
    days = [FIRST_DAY + datetime.timedelta(days=day) for day in range(DAYS)]
    weekday = np.array([day.weekday() for day in days])
    holiday = np.array([int((day.month, day.day) in _HOLIDAYS) for day in days])
    # 1 in the middle of January, -1 in the middle of July.
    winter = np.cos(2 * np.pi * (np.arange(DAYS) - 15) / _YEAR)
    cloud = _smooth(0.8 * sky + 0.6 * rng.normal(0, 1, DAYS), 0.6)
    rain = np.clip(5 * (cloud + 0.3 * winter - 0.5), 0, None)
    temperature = 11 - 10 * winter - 0.3 * rain + 2.5 * _smooth(rng.normal(0, 1, DAYS), 0.8)
    busy = np.array(_WEEKDAY_TRAFFIC)[weekday] * rng.uniform(0.7, 1.3) - 0.35 * holiday
    traffic = np.clip(1 + busy + 0.012 * rain + 0.08 * _smooth(rng.normal(0, 1, DAYS), 0.5), 0.2, None)
    value = (
        rng.uniform(32, 50)
        + rng.uniform(0.7, 1.3) * np.array(_WEEKDAY_MINUTES)[weekday]
        + rng.uniform(2, 5) * winter
        + rng.uniform(0.4, 0.9) * rain
        + rng.uniform(10, 18) * (traffic - 1)
        + np.clip(-temperature, 0, None) * 0.8
        + 4 * holiday
        + rng.uniform(-2, 3) * np.arange(DAYS) / _YEAR
        + 1.5 * _smooth(rng.normal(0, 1, DAYS), 0.6)
    )
    numbers = {"value": value, "rain": rain, "temperature": temperature, "traffic": traffic}
    return pa.table(
        {
            "series": pa.array([name] * DAYS, pa.string()),
            "date": pa.array([day.isoformat() for day in days], pa.string()),
            **{column: pa.array(np.round(values, 3)) for column, values in numbers.items()},
            "holiday": pa.array(holiday, pa.int64()),
        }
    )


def _smooth(noise: Floats, memory: float) -> Floats:
    """Noise of which each day keeps a part of the day before; its variance stays as it was."""
    smoothed = noise.copy()
    for day in range(1, len(noise)):
        smoothed[day] = memory * smoothed[day - 1] + np.sqrt(1 - memory**2) * noise[day]
    return smoothed
