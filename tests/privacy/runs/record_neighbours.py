"""Data sets on disk that differ in one client's records: one more, one less, an odd one, all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from atoll.data.dataset import Dataset
from atoll.job.job import Job
from atoll.tasks import task_named
from tests.data.test_bad_data import png
from tests.support.task_data import ready
from tests.support.task_jobs import job_of
from tests.tasks.test_data_info import (
    GIVEN,
    ODD,
    OPTIONS,
    all_of_class,
    rows_of,
    with_one_more,
    with_records,
    with_tables,
)

Record = dict[str, Any]
Change = Callable[[Record], Record]

CLIENTS = ("a", "b", "c")
RECORDS = 6
"""Of the first client, whose data has neighbours."""


LISTS = ("items", "texts", "times")
"""What a history has an entry of for each item."""


def picture(size: int) -> dict[str, Any]:
    return {"bytes": png(size, size), "path": None}


def in_pictures(size: int, **more: Any) -> Change:
    return lambda row: row | {"image": picture(size)} | more


LARGE: dict[str, Change] = {
    "text-classification": lambda row: row | {"text": "word " * 400},
    "text-labels": lambda row: row | {"text": "word " * 400, "labels": ["good", "cheap"]},
    "text-regression": lambda row: row | {"text": "word " * 400, "number": 1e9},
    "image-classification": in_pictures(300),
    "image-text": in_pictures(300, text="word " * 400),
    "medical-imaging": in_pictures(300),
    "object-detection": lambda row: row | {
        "image": picture(300), "boxes": [[0.0, 0.0, 300.0, 300.0]] * 8, "classes": row["classes"][:1] * 8,
    },
    "segmentation": lambda row: row | {"mask": {"bytes": all_of_class(row, 2), "path": None}},
    "forecasting": lambda row: row | {"history": [1e30 for _ in row["history"]]},
    "survival": lambda row: row | {"time": 1e9, "features": dict.fromkeys(row["features"], 1e9)},
    "recommendation": lambda row: row | {name: row[name] * 40 for name in LISTS if row.get(name)},
    "text-to-text": lambda row: row | {"source": "word " * 400, "target": "word " * 40},
    "question-answering": lambda row: row | {"question": "word " * 400, "answer": "word " * 40},
    "language-modeling": lambda row: row | {"messages": row["messages"] * 40},
    "preference": lambda row: row | {"chosen": "word " * 400, "rejected": "other " * 400},
    "multiple-choice": lambda row: row | {"choices": ["word " * 400 + "a", "b"] * 12 + ["c"], "answer": 24},
    "speech-recognition": lambda row: row | {"transcript": row["transcript"] * 9},
    "token-classification": lambda row: row | {"tokens": ["word"] * 400, "tags": ["O"] * 400},
    "intent": lambda row: row | {"text": "word " * 400, "slots": "O " * 400},
}  # fmt: skip
"""The record more, as large as it gets."""

SMALL: dict[str, Change] = {
    "text-classification": lambda row: row | {"text": "a"},
    "text-labels": lambda row: row | {"text": "a", "labels": []},
    "text-regression": lambda row: row | {"text": "a", "number": 0.0},
    "image-classification": in_pictures(1),
    "image-text": in_pictures(1, text="a"),
    "medical-imaging": in_pictures(1),
    "object-detection": in_pictures(1, boxes=[], classes=[]),
    "segmentation": lambda row: row | {"mask": {"bytes": all_of_class(row, 0), "path": None}},
    "forecasting": lambda row: row | {"history": [0.0 for _ in row["history"]]},
    "survival": lambda row: row | {"time": 0.0, "features": dict.fromkeys(row["features"], 0.0)},
    "recommendation": lambda row: row | {name: row[name][:1] for name in LISTS if row.get(name)},
    "text-to-text": lambda row: row | {"source": "a", "target": "a"},
    "question-answering": lambda row: row | {"question": "a", "answer": "a"},
    "language-modeling": lambda row: row | {"messages": [{"role": "assistant", "content": ""}]},
    "preference": lambda row: row | {"chosen": "", "rejected": ""},
    "multiple-choice": lambda row: row | {"question": "", "choices": ["a", "b"], "answer": 0},
    "speech-recognition": lambda row: row | {"transcript": ""},
    "token-classification": lambda row: row | {"tokens": ["a"], "tags": ["O"]},
    "intent": lambda row: row | {"text": "a", "slots": "O"},
}  # fmt: skip
"""The record more, with next to nothing in it."""


@dataclass(eq=False)
class TaskData:
    """A task's small job, and the folders of three clients with their neighbours."""

    task: str
    folder: Path

    @cached_property
    def rows(self) -> Dataset:
        """A few records of the task's small job."""
        made = self.folder / "made"
        made.mkdir(parents=True)
        return rows_of(job_of(self.task, "full"), made)

    @cached_property
    def job(self) -> Job:
        """The job, which gives what greetings may not tell."""
        setting = job_of(self.task, "full")
        given = GIVEN[self.task](self.rows) if self.task in GIVEN else {}
        if "label" in self.rows.column_names and self.task not in GIVEN:
            given = {"classes": list(setting.data.classes or sorted(set(self.rows["label"])))}
        options = dict(setting.task.options) | OPTIONS.get(self.task, {})
        source = str(self.clients[0])
        full = with_tables(setting, {"data": {"source": source} | given, "task": {"options": options}})
        return ready(full, self.folder)

    @cached_property
    def clients(self) -> list[Path]:
        """The folders of all clients."""
        parts = (range(RECORDS), (1, 6, 7), (2, 7))
        return [
            self._written(name, self.rows.select(part)) for name, part in zip(CLIENTS, parts, strict=True)
        ]

    @cached_property
    def neighbours(self) -> Mapping[str, Path]:
        """Folders in the first client's place, by what is another there: one record, more or less."""
        own = self.rows.select(range(RECORDS))
        changes = {"unfit": ODD, "large": LARGE, "small": SMALL}
        found = {
            f"without the {name}": own.select([row for row in range(RECORDS) if row != place])
            for name, place in (("first", 0), ("third", 2), ("last", RECORDS - 1))
        }
        found |= {
            f"the {name} again": own.select([*range(RECORDS), place])
            for name, place in (("first", 0), ("last", 5))
        }
        found |= {
            f"one more, {name}": with_one_more(own, change[self.task]) for name, change in changes.items()
        }
        return {
            name: self._written(f"other/{number}/a", part)
            for number, (name, part) in enumerate(found.items())
        }

    @cached_property
    def others(self) -> Mapping[str, Path]:
        """Folders in the first client's place, by what is another there: everything."""
        found = {
            "other records": self.rows.select([6, 7]),
            "a single record": self.rows.select([3]),
            "large records": _all(self.rows.select(range(3)), LARGE[self.task]),
            "unfit records": _all(self.rows.select(range(3)), ODD[self.task]),
        }
        return {
            name: self._written(f"others/{number}/a", part)
            for number, (name, part) in enumerate(found.items())
        }

    def _written(self, name: str, part: Dataset) -> Path:
        task_named(self.task).write(part, self.folder / name, job_of(self.task, "full").data)
        return self.folder / name


def _all(rows: Dataset, change: Change) -> Dataset:
    return with_records(rows, [change(rows[number]) for number in range(len(rows))])


def neighbours_of(data: TaskData, job: Job) -> Iterator[tuple[str, Path]]:
    """What a unit that is promised privacy may have instead: a record more or less, or other data."""
    if "example" in job.privacy.units:
        yield from data.neighbours.items()
    if job.privacy.units == ("client",):
        yield from data.others.items()
