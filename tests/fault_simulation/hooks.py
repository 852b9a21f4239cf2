"""Where the simulation takes hold of the real code: clock, disk and chance; and who listens."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import sha256
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

import atoll.client.app as client_app
import atoll.client.dp.poisson as poisson
import atoll.client.dp.secure_aggregation as client_sums
import atoll.client.state.store as store
import atoll.kit.signed_replies as signed_replies
import atoll.privacy.secagg as secagg
import atoll.server.app as server_app
import atoll.server.received as received
import atoll.server.rounds.aggregation as aggregation
import atoll.server.rounds.central_dp as central_dp
import atoll.server.rounds.loop as loop
import atoll.server.rounds.secure_aggregation as secure_aggregation
import atoll.server.rounds.start as start
import atoll.server.run.checkpoint as checkpoint
import atoll.server.run.run_job as run_job
import atoll.system.chained_log as chained_log
import atoll.system.durable_files as durable_files
from atoll.client.site import Site
from atoll.learning.learner import Learner
from atoll.protocol.messages import Failure, Update
from atoll.protocol.tensors import tensors_sha256
from atoll.server.run_audit import RunAuditLog
from tests.fault_simulation.disk import Died
from tests.fault_simulation.jobs import learner_key
from tests.fault_simulation.observed import Asked, Judged, Merged
from tests.fault_simulation.world import BOOKS, World

WRITING_SECONDS = 0.6
"""How long a checkpoint is on its way to the disk, at most."""


class Current:
    """The world that is played in this process now."""

    world: World | None = None

    @classmethod
    def get(cls) -> World:
        assert cls.world is not None
        return cls.world


class Clock:
    """The module `time`, by the world's scheduler."""

    @staticmethod
    def monotonic() -> float:
        return Current.get().scheduler.now

    time = monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        Current.get().scheduler.sleep(seconds)


class SystemCalls:
    """The module `os` of durable_files: the disk of the machine that is at work, if a world is played."""

    def __getattr__(self, name: str) -> Any:
        if Current.world is not None and name in (
            "open",
            "close",
            "write",
            "fsync",
            "ftruncate",
            "replace",
            "unlink",
        ):
            return getattr(Current.world.acting.disk, name)
        return getattr(os, name)


@dataclass
class LaterWork:
    """A checkpoint on its way to the disk: as a Future, done when the scheduler says so or somebody waits."""

    work: Callable[[], int]
    is_done: bool = False
    value: int = 0
    error: Exception | None = None

    def begin(self) -> None:
        if not self.is_done:
            self.is_done = True
            try:
                self.value = self.work()
            except Exception as error:  # noqa: BLE001 - a Future keeps any
                self.error = error

    def done(self) -> bool:
        return self.is_done

    def result(self) -> int:
        self.begin()
        if self.error is not None:
            raise self.error
        return self.value


class LaterWriter:
    """In place of the thread that writes checkpoints."""

    def submit(self, work: Callable[..., int], *arguments: Any) -> LaterWork:
        world = Current.get()
        later, life = LaterWork(lambda: work(*arguments)), world.life

        def act() -> None:
            if world.life == life and not world.server.disk.is_dead:
                later.begin()

        world.scheduler.after(WRITING_SECONDS * world.scheduler.draw(), act)
        return later


class UncontestedLock:
    """In place of a lock between processes, of which a machine has one here."""

    def __init__(self, path: str, poll_interval: float) -> None:
        self.lock_counter = 0

    def __enter__(self) -> UncontestedLock:
        self.lock_counter += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.lock_counter -= 1


class SharedLearner:
    """The server's learner, made once in a process for each job and what its clients tell."""

    of = staticmethod(cache(lambda key: Learner.of(*key.arguments)))


@dataclass(frozen=True)
class LearnerKey:
    """What a learner is made of, compared by the job's hash and the facts."""

    name: str
    arguments: tuple[Any, ...] = field(compare=False)


class Learners:
    """In place of the class Learner as a run starts."""

    @staticmethod
    def of(job: Any, task: Any, data_info: Any) -> Any:
        return SharedLearner.of(LearnerKey(learner_key(job, data_info), (job, task, data_info)))


def chance(count: int) -> NDArray[np.uint64]:
    """Words of the seed's sequence, in place of the operating system's."""
    seed = int(Current.get().scheduler.draw() * 2**53)
    return np.asarray(np.random.Philox(key=seed).random_raw(count), dtype=np.uint64)


class Nonces:
    """In place of the module `secrets`: numbers by the seed that no draw of the scheduler goes into."""

    @staticmethod
    def token_hex(size: int) -> str:
        world = Current.get()
        return sha256(f"{world.scenario.seed} {next(world.nonces)}".encode()).hexdigest()[: 2 * size]


def observing(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Put what `make` makes of an attribute in its place, until the end of the block."""
    return patch.object(owner, name, make(getattr(owner, name)))


def _encode_reply(original: Any) -> Any:
    def encode_reply(reply: Any) -> Any:
        world = Current.get()
        if isinstance(reply, Update):
            sha = tensors_sha256(reply.delta)
            world.seen.made[sha].add((reply.client, world.run_at_work, reply.round))
            if "example" in world.job.privacy.units:
                world.seen.released[world.acting.name].add(sha)
        return original(reply)

    return encode_reply


def _merge_updates(original: Any) -> Any:
    def merge_updates(run: Any, updates: Any, round: int) -> None:
        world = Current.get()
        before = tensors_sha256(run.state.tensors)
        merged = tuple((u.client, tensors_sha256(u.delta)) for u in updates)
        original(run, updates, round)
        key = run.request_origin(round)["run"]
        after = tensors_sha256(run.state.tensors)
        world.seen.merged.append(Merged(world.life, key, round, merged, before, after))
        world.scheduler.note(f"merged round {round} of {', '.join(name for name, _ in merged)}")

    return merge_updates


def _train_request(original: Any) -> Any:
    def train_request(run: Any, round: int) -> Any:
        world, request = Current.get(), original(run, round)
        model = tensors_sha256(request.tensors)
        world.seen.asked.append(Asked(world.life, request.run, round, model))
        if round > 1 and "client" in world.job.privacy.units:
            world.seen.released[BOOKS].add(f"{request.run} {model}")
        return request

    return train_request


def held(found: Any) -> str:
    """A hash of what a checkpoint holds."""
    tensors = {f"state/{n}": v for n, v in found.state.items() if hasattr(v, "shape")}
    numbers = sorted((n, v) for n, v in found.state.items() if not hasattr(v, "shape"))
    return tensors_sha256(found.tensors | tensors) + repr(numbers)


def _save(original: Any) -> Any:
    def save(folder: Any, found: Any, log: Any = None) -> None:
        world = Current.get()
        if folder.parent.name == "run":
            world.seen.written[found.round].add(held(found))
        original(folder, found, log)
        if folder.parent.name == "run":
            world.seen.durable[found.round].add(held(found))
            kept = len(list(folder.glob("round-*.safetensors")))
            world.seen.largest("checkpoints kept", kept)

    return save


def _continue_from(original: Any) -> Any:
    def continue_from(run: Any, found: Any) -> None:
        world = Current.get()
        world.seen.resumed.append((world.life, found.round, held(found)))
        original(run, found)

    return continue_from


def _answer(original: Any) -> Any:
    def answer(site: Site, request: Any, names: Any) -> Any:
        Current.get().run_at_work = request.run
        return original(site, request, names)

    return answer


def _load(original: Any) -> Any:
    def load(site: Site, learner: Any, request: Any, names: Any) -> Any:
        world = Current.get()
        if names:
            world.seen.worked.add((world.acting.name, learner.job.hash))
        return original(site, learner, request, names)

    return load


def _store_save(original: Any) -> Any:
    def save(memory: Any, run: str, round: int, states: Any) -> None:
        original(memory, run, round, states)
        for client in states:
            Current.get().seen.largest("states kept", len(memory._rounds(run, client)))

    return save


def _masked(original: Any) -> Any:
    def masked(person: Any, dealt: Any, vector: Any) -> Any:
        found = original(person, dealt, vector)
        Current.get().vectors[person.context, person.name] = vector.copy()
        return found

    return masked


def _unmask_sum(original: Any) -> Any:
    def unmask_sum(
        keys: Any, dealers: Any, masked: Any, revealed: Any, threshold: int, context: bytes
    ) -> Any:
        world, total = Current.get(), original(keys, dealers, masked, revealed, threshold, context)
        expected = sum((world.vectors[context, name] for name in masked), np.zeros_like(total))
        if not np.array_equal(total, expected):
            world.seen.sums.append(f"the sum of {sorted(masked)} is another than their vectors'")
        return total

    return unmask_sum


def _greetings(original: Any) -> Any:
    def greetings(content: Any, *given: Any) -> Any:
        world, found = Current.get(), original(content, *given)
        if kind := world.forgery(content):
            world.seen.judged += [Judged(world.life, kind, one.client, one.refusal) for one in found]
        return found

    return greetings


def _replies(original: Any) -> Any:
    def replies(self: Any) -> Iterator[Any]:
        world = Current.get()
        kind = world.forgery(self.content)
        for reply in original(self):
            if kind:
                reason = reply.reason if isinstance(reply, Failure) else ""
                world.seen.judged.append(Judged(world.life, kind, reply.client, reason))
            yield reply

    return replies


def _greeted(original: Any) -> Any:
    def greeted(log: Any, site: str, hellos: Any) -> None:
        world = Current.get()
        world.seen.logged |= {(world.life, one.client, one.refusal) for one in hellos}
        original(log, site, hellos)

    return greeted


def _answered(original: Any) -> Any:
    def answered(log: Any, request: Any, answers: Any) -> None:
        if (world := Current.world) is not None:  # None where what a killed life left is cleared away
            told = ((client, one.get("refused", "")) for client, one in answers.items())
            world.seen.logged |= {(world.life, *one) for one in told}
        original(log, request, answers)

    return answered


def _refused(original: Any) -> Any:
    def refused(log: Any, request: Any, answers: Any) -> None:
        world = Current.get()
        world.seen.logged |= {(world.life, client, one["refused"]) for client, one in answers.items()}
        original(log, request, answers)

    return refused


def _silence_of_the_dead(told: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for exceptions that nobody can catch: of what a killed life left open it says nothing."""

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Died):
            told(unraisable)

    return hook


@contextmanager
def simulated() -> Iterator[None]:
    """For the time of the block the real code runs in the current world, whichever that is."""
    numbers: dict[str, Any] = dict.fromkeys(("_task_id", "_run_id", "_node_id"), 1)
    writer = cached_property(lambda manager: LaterWriter())
    writer.__set_name__(checkpoint.CheckpointManager, "_writer")
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(TaskIdentity, **numbers))
        for module in (server_app, client_app, checkpoint, loop, run_job, store):
            stack.enter_context(patch.object(module, "time", Clock))
        stack.enter_context(patch.object(durable_files, "os", SystemCalls()))
        stack.enter_context(patch.object(checkpoint.CheckpointManager, "_writer", writer))
        for module in (poisson, client_sums, central_dp):
            stack.enter_context(patch.object(module, "entropy", chance))
        stack.enter_context(patch.object(signed_replies, "secrets", Nonces))
        stack.enter_context(patch.object(chained_log, "FileLock", UncontestedLock))
        stack.enter_context(patch.object(start, "Learner", Learners))
        stack.enter_context(patch.object(sys, "unraisablehook", _silence_of_the_dead(sys.unraisablehook)))
        for owner, name, make in EARS:
            stack.enter_context(observing(owner, name, make))
        logging.getLogger("absl").setLevel(logging.ERROR)
        level = logging.getLogger("atoll").level
        logging.getLogger("atoll").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logging.getLogger("atoll").setLevel(level)


EARS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (client_app, "encode_reply", _encode_reply),
    (server_app, "greetings", _greetings),
    (received.Replies, "__iter__", _replies),
    (RunAuditLog, "greeted", _greeted),
    (RunAuditLog, "answered", _answered),
    (RunAuditLog, "refused", _refused),
    (aggregation, "merge_updates", _merge_updates),
    (aggregation, "train_request", _train_request),
    (checkpoint, "save", _save),
    (start, "_continue_from", _continue_from),
    (secagg.Participant, "masked", _masked),
    (secure_aggregation, "unmask_sum", _unmask_sum),
    (Site, "answer", _answer),
    (Site, "load", _load),
    (store.ClientStateStore, "save", _store_save),
)
