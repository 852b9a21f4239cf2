"""Simulated devices: how fast each client computes and communicates, and whether it is available.

An available client answers a request after

    2 * latency + 8 * down / download + examples * epochs / speed + 8 * up / upload

seconds, where `down` is the size in bytes of the trained tensors, `up` that of an update as it is sent,
`examples` the number of its training examples, and rates are in bit/s. A client is available with its own
probability, drawn anew for every request; an unavailable one is known at once. A round ends when it has as
many updates as it wants (`federation.cohort`), or all available clients have answered, or at the deadline,
whichever is first. The server's own time is not counted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atoll.client.training.batches import uniform_numbers
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.validation_split import expected_training_examples
from atoll.server.rounds.participation import (
    AvailabilityModel,
    CohortRequest,
    Participation,
    always_available,
)
from atoll.sim.population.population import Population, client_names, number_of

Numbers = NDArray[np.float64]

FIELDS = {
    "examples_per_second": None,
    "download_mbps": math.inf,
    "upload_mbps": math.inf,
    "latency_seconds": 0.0,
    "availability": 1.0,
}
"""The columns of a device profile and their default values; None: the column is required."""


@dataclass(frozen=True)
class Profile:
    """A device profile: the properties of each kind of device, by column [kinds], and each client's kind.

    Either `rows` maps every client to its kind, or `ends` [kinds] are the cumulative shares of the kinds.
    """

    columns: dict[str, Numbers]
    ends: Numbers | None
    rows: dict[str, int]

    @classmethod
    def read(cls, path: Path, names: Sequence[str]) -> Profile:
        """Read a CSV with one row per client (column `client`) or per kind of device (column `share`).

        Raises:
            ConfigError: the file is invalid; one line that names the file and the line in it.
        """
        table = _rows(path)
        columns = {
            field: np.array([_number(path, line, row, field, default) for line, row in table])
            for field, default in FIELDS.items()
        }
        if "client" in table[0][1]:
            rows = {row["client"].strip(): place for place, (_, row) in enumerate(table)}
            missing = next((name for name in names if name not in rows), None)
            if missing is not None:
                raise ConfigError(
                    f"{path}: no row for {missing}, expected one for each of {len(names)} clients"
                )
            return cls(columns, None, rows)
        shares = np.array([_number(path, line, row, "share", None) for line, row in table])
        return cls(columns, np.cumsum(shares) / shares.sum(), {})

    def kinds(self, clients: Sequence[str], seed: int) -> NDArray[np.int64]:
        """The index of each client's kind, [clients]; drawn once per client if kinds have shares."""
        if self.ends is None:
            return np.array([self.rows[client] for client in clients], dtype=np.int64)
        numbers = np.array([number_of(client) for client in clients], dtype=np.uint64)
        uniform = uniform_numbers(numbers ^ np.uint64(stream_seed(seed, "device")), 1)[:, 0]
        drawn: NDArray[np.int64] = (uniform[:, None] >= self.ends[None, :-1]).sum(axis=1)
        return drawn


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells by column) for every row of the CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            table = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot be read as CSV ({why}); it is federation.devices") from None
    unknown = next((name for name in header if name not in {*FIELDS, "client", "share"}), None)
    if unknown is not None:
        raise ConfigError(
            f"{path}: unknown column {unknown!r}, expected client or share, {', '.join(FIELDS)}"
        )
    if ("client" in header) == ("share" in header):
        raise ConfigError(f"{path}: columns {header}, expected one of client and share")
    if not table:
        raise ConfigError(f"{path}: holds no row, expected one for each client or kind of device")
    return table


def _number(path: Path, line: int, row: dict[str, str], field: str, default: float | None) -> float:
    """The number in a cell; the default if the cell is empty or the column is missing."""
    text = (row.get(field) or "").strip()
    if not text and default is not None:
        return default
    allowed = "a number from 0 to 1" if field == "availability" else "a number above 0"
    allowed = "a number from 0 on" if field == "latency_seconds" else allowed
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    least_is_in = field in ("availability", "latency_seconds")
    most = 1.0 if field == "availability" else math.inf
    if not ((value >= 0 if least_is_in else value > 0) and value <= most and math.isfinite(value)):
        raise ConfigError(f"{path} line {line}: {field} is {text!r}, expected {allowed}")
    return value


@dataclass(frozen=True)
class VirtualClock:
    """Decides by the device profile which clients answer in time, and how long the round takes."""

    job: Job
    profile: Profile
    sizes: NDArray[np.int64]

    def __call__(self, call: CohortRequest) -> Participation:
        if not call.cohort:
            return Participation([], seconds=0.0)
        return turnout(call.cohort, self.arrivals(call), call.goal, self.job.federation.deadline or math.inf)

    def arrivals(self, call: CohortRequest) -> Numbers:
        """Seconds from the request to each client's reply, [cohort]; infinite for unavailable clients."""
        numbers = np.array([number_of(client) for client in call.cohort], dtype=np.int64)
        kinds = self.profile.kinds(call.cohort, self.job.seed)
        number = stream_seed(self.job.seed, "available", call.round, call.attempt)
        drawn = uniform_numbers(numbers.astype(np.uint64) ^ np.uint64(number), 1)[:, 0]
        is_there = drawn < self._of("availability", kinds)
        seconds = self.seconds(kinds, self.sizes[numbers], call.bytes_down, call.bytes_up, call.steps)
        return np.where(is_there, seconds, math.inf)

    def seconds(
        self,
        kinds: NDArray[np.int64],
        sizes: NDArray[np.int64],
        bytes_down: int,
        bytes_up: int,
        steps: int | None = None,
    ) -> Numbers:
        """Seconds from the request to each available client's reply, [clients].

        `kinds` are the clients' kinds of device, `sizes` their numbers of examples, of which the expected
        number of validation examples isn't trained on. `steps` is the number of local steps; None: the job's.
        """
        trained = expected_training_examples(sizes, self.job.data)
        work = self.job.train.with_steps(steps).expected_examples_seen(trained) / self._of(
            "examples_per_second", kinds
        )
        received = 8 * bytes_down / 1e6 / self._of("download_mbps", kinds)
        sent = received + 8 * bytes_up / 1e6 / self._of("upload_mbps", kinds)
        total: Numbers = 2 * self._of("latency_seconds", kinds) + work + sent
        return total

    def _of(self, field: str, kinds: NDArray[np.int64]) -> Numbers:
        return self.profile.columns[field][kinds]


def turnout(cohort: Sequence[str], arrival: Numbers, goal: int, deadline: float) -> Participation:
    """The clients with the first `goal` arrivals before the deadline; of equal times the earlier name wins.

    `arrival` is in seconds, [cohort], infinite for unavailable clients; `deadline` is in seconds.
    """
    there = int(np.isfinite(arrival).sum())
    in_time = int((np.isfinite(arrival) & (arrival <= deadline)).sum())
    first = np.argsort(arrival, kind="stable")[: min(in_time, goal)]
    if len(first) == min(goal, there):
        seconds = float(arrival[first].max()) if len(first) else 0.0
    else:
        seconds = deadline
    names = [cohort[place] for place in np.sort(first).tolist()]
    return Participation(
        names, seconds, unavailable=len(cohort) - there, late=there - in_time, surplus=in_time - len(first)
    )


def clock_of(population: Population) -> AvailabilityModel:
    """The availability model of the job: its simulated devices, or else all clients always available.

    Raises:
        ConfigError: the device profile is invalid.
    """
    job = population.job
    if job.federation.devices is None:
        return always_available
    profile = Profile.read(Path(job.federation.devices), client_names(job.federation.clients))
    return VirtualClock(job, profile, population.assignment.sizes)
