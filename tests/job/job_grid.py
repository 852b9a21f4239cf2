"""Jobs for every pair of a job's options: what each key may be is read from the job's own schema.

`python -m tests.job.job_grid` writes `tests/job/job_grid.json` anew: rows of options such that every pair
that any job accepts is in one of them (pairwise covering, after Cohen et al. 1997, "The AETG System").
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from atoll.backbones.brought.names import IMAGE_AUGMENTATIONS
from atoll.client.dp.ghost_norms_fit import refuse_without_ghost_norms
from atoll.errors import InputError
from atoll.job.job import Job
from atoll.job.privacy import PLACES
from atoll.job.section import Section
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.server.job_checks import validate_for_deployment
from atoll.server.run.run_job import validate_job
from atoll.tasks import task_named
from tests.privacy.runs.record_neighbours import TaskData
from tests.support.task_jobs import TABLES

FILE = Path(__file__).with_suffix(".json")

TRIES = 60
"""Rows in which two values are tried together before they count as excluding each other."""
BUILT = (
    "task", "tune.method", "backbone.prune", "backbone.prune_kind", "train.dropout",
    "train.checkpoint_activations", "train.cached_states", "tune.layers", "privacy.ghost_norms",
)  # fmt: skip
"""Keys that ask something of the network itself."""
COSTLY = ("image-text", "medical-imaging", "object-detection", "segmentation")
"""Tasks whose rows take seconds: their pairs come last, so that the others' rows have all else."""
FIRST = ("task", "tune.method", "promise")
Item = tuple[str, Any]
Pair = tuple[Item, Item]
Row = dict[str, Any]
"""Values by dotted key, `task`, `tune.method` and `promise` first; what isn't there has its default."""

GIVEN: dict[str, tuple[Any, ...]] = {
    "train.augment": tuple((name,) for name in IMAGE_AUGMENTATIONS),
    # One of each kind: the others differ in what the server does with the same updates.
    "strategy.name": (
        "fedavg",
        "fedavgm",
        "fedprox",
        "fedadam",
        "reptile",
        "fedexp",
        "coordinate-median",
        "per-fedavg",
        "pfedme",
    ),
    "train.epochs": (2,),
    "train.steps": (2,),
    "train.lr": (1.0,),
    "train.clip_norm": (0.1,),
    # Factors in the head are for one that is a part of the network, which only a built model can tell.
    "tune.head": ("frozen", "trained"),
    "tune.seeds": (8,),
    "tune.perturbation": (0.01,),
    "backbone.image_size": (40,),
    "backbone.max_tokens": (12,),
    "backbone.prune": (0.5,),
    "federation.cohort": (3,),
    "federation.rounds": (2,),
    "federation.quorum": (1.0,),
    "evaluate.clients": (1,),
    # What else can be kept is refused with every promise.
    "personal.keep": ("mixture",),
    "privacy.steps": (2,),
}
"""Values of keys whose type doesn't say which there are, or where most of its values would say little."""

LEFT_OUT: dict[str, str] = {
    "task.name": "each has rows",
    "task.options": "each task's own",
    "data.source": "a site has data of its own",
    "train.augment_options": "an extension's own",
    **dict.fromkeys(("data.revision", "data.subset"), "a site has data of its own"),
    "data.options": "an extension's source's own",
    "data.partition": "a site's data isn't dealt",
    **dict.fromkeys(("data.text", "data.image", "data.label", "data.columns"), "names of the user's columns"),
    "data.time_format": "how the user's times are written",
    **dict.fromkeys(("data.bits", "data.window"), "how the user's pictures are stored"),
    "data.classes": "given in every row: greetings tell nothing else",
    "data.test": "the server's own data",
    "data.test_fraction": "the server's own data",
    "backbone.name": "one a task",
    "backbone.weights": "random: others have to be fetched",
    "backbone.offline": "nothing is fetched",
    "backbone.options": "each network's own",
    "backbone.compile": "minutes of compiling, for the same arithmetic",
    "tune.targets": "names of a network's layers",
    "tune.lora_ranks": "refused with every promise",
    "tune.then": "refused with every promise",
    "tune.keep_sums": "refused with every promise",
    "tune.ridge": "how the server solves for a head",
    "tune.feature_norm": "given with tune.head_init, which needs it",
    "train.device": "this machine has a processor",
    "train.threads": "more than one changes no bits, and other tests say so",
    "train.teacher": "a run's directory: what it teaches is public",
    "federation.clients": "three in every row",
    "federation.wait": "a time",
    "federation.round_timeout": "a time",
    **dict.fromkeys(
        ("federation.selection", "federation.candidates", "federation.oort"), "refused with every promise"
    ),
    "federation.weights": "refused with every promise but 'equal', which is what a promise does",
    "federation.weight_cap": "as federation.weights",
    "federation.devices": "for simulations",
    "federation.deadline": "for simulations",
    "federation.over_sampling": "for simulations",
    **dict.fromkeys(
        ("federation.concurrency", "federation.order"),
        "with fedbuff, whose bound tests/server/rounds/test_asynchronous.py sees, and what promises refuse",
    ),
    "strategy.options": "each extension's own",
    "personal.head_epochs": "goes with personal.keep = 'head', refused with every promise",
    "personal.mixing": "its default stands in the rows of personal.method = 'apfl'",
    **dict.fromkeys(
        (
            "train.lr_schedule",
            "train.lr_schedule_over",
            "train.lr_warmup",
            "train.lr_step",
            "train.lr_decay",
            "train.layer_decay",
        ),
        "a part of the learning rate that follows from the number of the round, the step or the block",
    ),
    **dict.fromkeys(
        ("strategy.lr_schedule", "strategy.lr_warmup", "strategy.lr_step", "strategy.lr_decay"),
        "a part of the server's step that follows from the number of the round",
    ),
    "evaluate.baselines": "for simulations",
    **dict.fromkeys(
        ("evaluate.contributions", "evaluate.permutations", "evaluate.truncation"),
        "measured by the server, on data of its own",
    ),
    "evaluate.metrics": "an extension's",
    **dict.fromkeys(
        ("attack.kind", "attack.clients", "attack.scale", "attack.victim", "attack.target"), "for simulations"
    ),
    "privacy.unit": "the promise says it",
    "privacy.where": "the promise says it",
    "privacy.example": "the promise says it",
    "privacy.client": "the promise says it",
    "privacy.seeded_noise": "refused by sites",
    "privacy.audit": "for simulations",
    "privacy.epsilon": "calibrates noise_multiplier, which is given",
    "privacy.noise_multiplier": "given in every row",
    "privacy.delta": "given in every row",
    "privacy.sampling_rate": "all are drawn: neighbours could not be compared otherwise",
    "privacy.count_deviation": "of no data",
    "privacy.mechanism": "banded noise needs cohorts that take turns; tests/privacy/test_banded.py",
    "privacy.bands": "as privacy.mechanism",
}
"""Keys without a place in the grid, and why."""

EXAMPLE = {"noise_multiplier": 1.0, "delta": 1e-3, "sampling_rate": 1.0, "clipping_norm": 0.5}
CLIENT = {"noise_multiplier": 1.0, "delta": 1e-3, "clipping_norm": 0.01}


def promises() -> dict[str, dict[str, Any]]:
    """`[privacy]` for each unit and each place of its noise, and for both units together."""
    own = {"example": EXAMPLE, "client": CLIENT}
    found: dict[str, dict[str, Any]] = {
        f"{unit}, {where}": {"unit": unit, "where": where} | own[unit]
        for unit, places in PLACES.items()
        for where in places
    }
    for where in PLACES["client"]:
        client = CLIENT | {"where": where}
        found[f"both, {where}"] = {"unit": "both", "example": EXAMPLE, "client": client}
    return found


@cache
def factors() -> dict[str, tuple[Any, ...]]:
    """The values that each key may have in a row, None for its default; no key without other values."""
    found: dict[str, tuple[Any, ...]] = {
        "task": tuple(sorted(TABLES)),
        "tune.method": get_args(dict(keys())["tune.method"].annotation),
        "promise": tuple(promises()),
    }
    for key, field in keys():
        if key not in LEFT_OUT and key not in found and (values := GIVEN.get(key) or typical(field)):
            found[key] = (None, *values)
    return found


def keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a job's tables."""
    for table, section in Job.model_fields.items():
        kind = section.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from ((f"{table}.{name}", field) for name, field in kind.model_fields.items())


def typical(field: FieldInfo) -> tuple[Any, ...]:
    """Values of a key other than its default; none where the type doesn't say which there are."""
    kind, limits = _plain(field.annotation)
    limits = [*limits, *field.metadata]
    if get_origin(kind) is Literal:
        found: tuple[Any, ...] = get_args(kind)
    elif kind is bool:
        found = (True, False)
    elif kind is float:
        found = (_within(limits, 0.5 if field.default != 0.5 else 0.25),)
    elif kind is int:
        found = (_within(limits, 2 if field.default != 2 else 3),)
    else:
        found = ()
    return tuple(value for value in found if value != field.default)


def _plain(kind: Any) -> tuple[Any, list[Any]]:
    """A type without None and without what limits it, and these limits."""
    if get_origin(kind) in (Union, UnionType):
        return _plain(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        plain, limits = _plain(inner)
        return plain, [*limits, *(m for meta in more for m in getattr(meta, "metadata", [meta]))]
    return kind, []


def _within(limits: list[Any], wanted: Any) -> Any:
    """The wanted number, or one within the limits near it."""
    for limit in limits:
        if getattr(limit, "ge", wanted) > wanted:
            wanted = limit.ge
        if getattr(limit, "gt", wanted - 1) >= wanted:
            wanted = limit.gt + 1
        if getattr(limit, "le", wanted) < wanted:
            wanted = limit.le
        if getattr(limit, "lt", wanted + 1) <= wanted:
            wanted = limit.lt / 2
    return wanted


def job_in(row: Mapping[str, Any], data: TaskData) -> Job | None:
    """The row's job of the task whose data this is; None where a server or a site would not accept it."""
    table = json.loads(data.job.canonical)
    table["privacy"] = json.loads(json.dumps(promises()[row["promise"]]))
    table["tune"] = {}
    table["federation"] |= {"clients": 3, "rounds": 1}
    table["train"] |= {"optimizer": "sgd", "batch_size": 2, "lr": 0.1}
    for key, value in row.items():
        if key in ("task", "promise") or value is None:
            continue
        place, name = key.split(".")
        section = table[place]
        if place == "privacy" and section["unit"] == "both" and name != "ghost_norms":
            section = section["example" if name == "steps" else "client"]
        section[name] = value
    if "head_init" in table["tune"]:
        table["tune"]["feature_norm"] = 5.0
        for key in ("sampling_rate", "clipping_norm") if table["privacy"]["unit"] == "example" else ():
            table["privacy"].pop(key)
    try:
        job = Job.parse(table, origin="grid")
        validate_job(job)
        validate_for_deployment(job)
    except InputError:
        return None
    built = {key: row[key] for key in BUILT if row.get(key) is not None}
    return job if _can_be_built(json.dumps(built), data) else None


@cache
def _can_be_built(of: str, data: TaskData) -> bool:
    """Whether the network has what is asked of it; only building it tells."""
    row = json.loads(of)
    table = json.loads(data.job.canonical) | {"tune": {}}
    table["train"]["optimizer"] = "sgd"
    if "privacy.ghost_norms" in row:
        table["privacy"] = {"unit": "example"} | EXAMPLE
    for key, value in row.items():
        if key != "task":
            place, name = key.split(".")
            table[place][name] = value
    try:
        job = Job.parse(table, origin="grid")
        rows = data.rows.select(range(2))
        task = task_named(job.task.name)
        facts = task.merge_info([task.local_info(rows, job.data, job.task.options)])
        learner = Learner.of(job, task, facts)
        learner.initial(), learner.encoder if task.uses_pooled_features else learner.model
        _ = learner.kept_states
        if job.privacy.ghost_norms:
            shard = learner.task.shard(rows, facts)
            learner.keep_states(shard)
            trainable.training_mode(learner.model)
            refuse_without_ghost_norms(learner, shard)
    except InputError:
        return False
    return True


@dataclass
class Covering:
    """Looks for rows until each pair of values that some job accepts is in one."""

    data: Mapping[str, TaskData]
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.values = [
            (key, value) for key, given in factors().items() for value in given if value is not None
        ]
        self.alone = {item: found for item in self.values if (found := self._rows_with(item))}

    @property
    def refused(self) -> list[Item]:
        """Values that no job under a promise accepts, whatever one other value is."""
        return [item for item in self.values if item not in self.alone]

    def rows(self) -> list[Row]:
        """Rows with every pair that is accepted together."""
        left = dict.fromkeys(
            _pair(one, other) for one, other in combinations(self.alone, 2) if one[0] != other[0]
        )
        rows: list[Row] = []
        while left:
            pair = next((pair for pair in left if pair[0][1] not in COSTLY), next(iter(left)))
            start = self._start(*pair)
            if start is None:
                left.pop(pair)
                continue
            rows.append(self._filled(start, left))
            for covered in pairs_of(rows[-1]):
                left.pop(covered, None)
        return rows

    def fewer(self, rows: Sequence[Row]) -> list[Row]:
        """The same pairs in fewer rows: those go whose own pairs others can take, the poorest first."""
        kept = [dict(row) for row in rows]
        left = Counter(pair for row in kept for pair in pairs_of(row))
        for row in sorted(kept, key=lambda row: sum(left[pair] == 1 for pair in pairs_of(row))):
            others = [other for other in kept if other is not row]
            changed = self._taken([pair for pair in pairs_of(row) if left[pair] == 1], others)
            if changed is None:
                continue
            left.subtract(pairs_of(row))
            for place, new in changed.items():
                left.subtract(pairs_of(others[place]))
                left.update(pairs_of(new))
                others[place] = new
            kept = others
        return kept

    def _taken(self, pairs: Sequence[Pair], rows: Sequence[Row]) -> dict[int, Row] | None:
        """Rows that have one of each pair's values and can have the other too, by place; None if none has."""
        changed: dict[int, Row] = {}
        for pair in pairs:
            for item, other in (pair, pair[::-1]):
                found = next(self._with_both(item, other, rows, changed), None)
                if found is not None:
                    changed[found[0]] = found[1]
                    break
            else:
                return None
        return changed

    def _with_both(
        self, item: Item, other: Item, rows: Sequence[Row], changed: Mapping[int, Row]
    ) -> Iterator[tuple[int, Row]]:
        places = [place for place, row in enumerate(rows) if row.get(item[0]) in (item[1], _listed(item[1]))]
        for place in self.random.sample(places, len(places)):
            row = changed.get(place, rows[place])
            if row.get(other[0]) in (other[1], _listed(other[1])):
                yield place, row
            elif other[0] not in row and self._accepted(row | dict([other])):
                yield place, row | dict([other])

    def _accepted(self, row: Row) -> bool:
        return job_in(row, self.data[row["task"]]) is not None

    def _rows_with(self, item: Item) -> list[Row]:
        """Rows of little more than the value that are accepted; with one other value where it needs that."""
        firsts = [(item[1],) if key == item[0] else factors()[key] for key in FIRST]
        starts = [dict(zip(FIRST, values, strict=True)) | dict([item]) for values in product(*firsts)]
        found = [row for row in starts if self._accepted(row)]
        if found:
            return found
        few = self._few(starts)
        for key, value in self.values:
            if key != item[0] and key not in FIRST and any(self._accepted(row | {key: value}) for row in few):
                return [row | {key: value} for row in starts if self._accepted(row | {key: value})]
        return []

    def _few(self, starts: list[Row]) -> list[Row]:
        """One of every task and way of tuning: which promise, chance decides."""
        mixed = self.random.sample(starts, len(starts))
        return list({(row["task"], row["tune.method"]): row for row in mixed}.values())

    def _start(self, one: Item, other: Item) -> Row | None:
        """A row with both values; None where none was accepted."""
        mine = self.random.sample(self.alone[one], min(len(self.alone[one]), TRIES))
        for row in sorted(mine, key=lambda row: row["task"] in COSTLY):
            joined = row | dict([other])
            theirs = self.alone[other]
            needed = {k: v for k, v in theirs[0].items() if k not in FIRST}
            for candidate in (joined, joined | needed | dict([one])):
                if self._accepted(candidate):
                    return candidate
        return None

    def _filled(self, row: Row, left: Mapping[Pair, Any]) -> Row:
        """The row with all else that brings missing pairs and is accepted."""
        others = [key for key in factors() if key not in row]
        self.random.shuffle(others)
        for key in others:
            gains = {value: _gain(row, key, value, left) for value in factors()[key] if value is not None}
            for value in sorted(gains, key=lambda value: -gains[value]):
                if gains[value] and self._accepted(row | {key: value}):
                    row = row | {key: value}
                    break
        return row


def _gain(row: Row, key: str, value: Any, left: Mapping[Pair, Any]) -> int:
    """How many of the missing pairs the value would bring."""
    return sum(_pair((key, value), other) in left for other in _items(row))


def _items(row: Mapping[str, Any]) -> list[Item]:
    return [(key, tuple(value) if isinstance(value, list) else value) for key, value in row.items()]


def _listed(value: Any) -> Any:
    """As a file has it."""
    return list(value) if isinstance(value, tuple) else value


def pairs_of(row: Mapping[str, Any]) -> Iterator[Pair]:
    """The pairs of values in a row."""
    items = _items(row)
    return (_pair(one, other) for one, other in combinations(items, 2))


@cache
def _order() -> dict[str, int]:
    return {key: place for place, key in enumerate(factors())}


def _pair(one: Item, other: Item) -> Pair:
    """Both in the order of the factors."""
    return (one, other) if _order()[one[0]] < _order()[other[0]] else (other, one)


def main() -> None:
    """Write the rows anew, and say which values no job under a promise accepts."""
    with TemporaryDirectory() as folder:
        covering = Covering({task: TaskData(task, Path(folder) / task) for task in sorted(TABLES)})
        rows = covering.fewer(covering.rows())
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sys.stdout.write(f"{len(rows)} rows; refused under every promise: {covering.refused}\n")


if __name__ == "__main__":
    main()
