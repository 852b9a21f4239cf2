"""A site's SuperNode, and the resident process that answers its tasks with the installed code.

Flower starts a new process for every message and runs the code in the run's bundle. Here one resident process
takes the tasks and runs `atoll.client.app` as installed on this site, so backbone, features and shard stay in
memory, and code from outside is never run. A site's use of non-public Flower calls is confined to this file.
"""

import hashlib
import io
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore import heartbeat
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from atoll.errors import JobError
from atoll.kit.code_hashes import HASHES, differing, installed_hashes, shown_files
from atoll.kit.extensions import is_of_extension, refusal
from atoll.system.signals import Interrupted, stop_on_signals

logger = logging.getLogger(__name__)

logging.getLogger("httpx").setLevel(logging.WARNING)
"""httpx logs a line for every call, and a site calls many times a minute."""

LARGEST_HASHES = 2**20
"""Bytes of a bundle's table of hashes; Atoll's own has about ten thousand."""

App = Callable[[Message, Context], Message]

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
SHARE = 0.2
"""The ratio of a pause to the time since there was work."""
ARRIVAL_SECONDS = 0.02
"""The pause before asking again for a message that hasn't arrived; Flower's own is 1 to 10 s."""
HEARTBEAT_SECONDS = 9
"""The SuperNode's heartbeat interval; Flower's default is 30 s.

A SuperNode subtracts 5 s, waits 0.7 to 0.9 times the rest, and sends a heartbeat. While a site's clients
train, heartbeats are all that the server receives, so they must come before the site counts as silent.
"""


@dataclass
class PollInterval:
    """The pause between two polls for work, proportional to the time since the last work.

    A site that has just been given work polls often, so the round that waits for it goes on at once. Idle
    sites poll seldom, because every poll costs the server's SuperLink about 15 ms of processor time.

    >>> interval = PollInterval(clock=iter((0.0, 0.1, 2.0, 60.0)).__next__)
    >>> interval.worked()
    >>> [interval.seconds, interval.seconds, interval.seconds]
    [0.05, 0.4, 1.0]
    """

    clock: Callable[[], float] = time.monotonic
    last: float = -math.inf

    def worked(self) -> None:
        """Set the time of the last work to now."""
        self.last = self.clock()

    @property
    def seconds(self) -> float:
        """The pause before the next poll."""
        return min(LONGEST_PAUSE, max(SHORTEST_PAUSE, SHARE * (self.clock() - self.last)))


class CodeDiffers(JobError):
    """The server's code, by the hashes in a run's bundle, is not the code that is installed on this site."""


@dataclass
class Executor:
    """Takes the SuperNode's tasks, one at a time, and answers them with the installed ClientApp."""

    address: str
    secret: bytes
    app: App
    hashes: dict[str, str]
    node_config: dict[str, str | int | float | bool]
    accepted: set[str] = field(default_factory=set)
    states: dict[int, RecordDict] = field(default_factory=dict)
    next_token: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the site is to stop; unlike an exception raised in a signal handler it can't be lost."""
    working: bool = False
    pace: PollInterval = field(default_factory=PollInterval)

    def stay(self) -> None:
        """Answer tasks as they arrive, until `stop` is set."""
        while not self.stop.is_set():
            if token := self.acquire():
                self._work(token)
            else:
                self.stop.wait(self.pace.seconds)

    def _work(self, token: str) -> None:
        self.working = True
        try:
            with suppress(Interrupted):
                self.run(token)
        finally:
            self.working = False
        self.pace.worked()

    def acquire(self) -> str:
        """The token of the SuperNode's next task; empty if there is none."""
        token, self.next_token = self.next_token or self._ask(), ""
        return token

    def _ask(self) -> str:
        signed = SuperExecAuthHttpInterceptor(
            master_secret=self.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        with _connection(self.address, signed) as client:
            try:
                answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            except httpx.HTTPError as error:
                logger.debug("the SuperNode does not answer: %s", error)
                return ""
        return answer.token

    def has_next_task(self) -> bool:
        """Whether the SuperNode has a further task; it handles one message at a time."""
        with self.lock:
            self.next_token = self.next_token or self._ask()
            return bool(self.next_token)

    def run(self, token: str) -> None:
        """Answer the task with this token, unless it is withdrawn, as when its run is stopped."""
        with _connection(self.address, RuntimeTokenHttpInterceptor(token)) as client, _heartbeat(client):
            client.has_next_task, client.stopping = self.has_next_task, self.stop.is_set
            try:
                self._run(client)
            except (httpx.HTTPError, ObjectPullError, ObjectPushError, RuntimeError) as error:
                # The server sends the request again, and then gets the stored reply.
                logger.warning(
                    "a task was withdrawn, or its reply was lost: %s", " ".join(str(error).split())
                )

    def _run(self, client: RuntimeHttpClient) -> None:
        """Send the app's reply, or an error message if the app raises an exception or the site stops."""
        message, context, run, fab = pull_task_input(client)
        began = time.monotonic()
        try:
            reply = self._answer(message, context, run.run_id, fab.content)
        except Interrupted:
            leaving = Error(ErrorCode.UNKNOWN, "the site is leaving")
            push_message(client, Message(leaving, reply_to=message), context)
            raise
        push_message(client, reply, context)
        push_task_output(client, None, SubStatus.COMPLETED, "")
        what = message.metadata.message_type
        logger.debug("run %d, %s: answered in %.3f s", run.run_id, what, time.monotonic() - began)

    def _answer(self, message: Message, context: Context, run_id: int, fab: bytes) -> Message:
        try:
            self._check(fab)
            context.node_config = {**self.node_config}
            context.state = self.states.setdefault(run_id, context.state)
            reply = self.app(message, context)
            self.states[run_id] = context.state
            return reply
        except CodeDiffers as error:
            logger.error("refused a task of run %d: %s", run_id, error)
            return Message(Error(ErrorCode.INVALID_FAB, str(error)), reply_to=message)
        except Exception as error:  # noqa: BLE001 - the server must be told of any failure
            _log_failure(run_id, error)
            # The error's text may quote the shard, so the server gets only the exception's type.
            reason = f"{type(error).__name__}; the site's log has the rest"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def _check(self, fab: bytes) -> None:
        """Raise CodeDiffers unless the server's code and extensions are those installed here, by hash."""
        digest = hashlib.sha256(fab).hexdigest()
        if digest in self.accepted:
            return
        theirs = bundle_hashes(fab)
        of_atoll = {name: value for name, value in theirs.items() if not is_of_extension(name)}
        different = differing(self.hashes, of_atoll)
        if different:
            raise CodeDiffers(
                f"site {self.node_config['name']}: the run's code is not the code installed here; "
                f"different: {shown_files(different)}"
            )
        if reason := refusal(theirs):
            raise CodeDiffers(f"site {self.node_config['name']}: {reason}")
        self.accepted.add(digest)


def answer_tasks() -> None:
    """Answer a SuperNode's tasks until SIGTERM; the entry point of a child process.

    `sys.argv[1]` is JSON: the SuperNode's `address`, the path of the file with its `secret`, and the
    `node_config`.
    """
    # Imported here because the SuperNode's process, whose entry point is below, needs no torch.
    from atoll.client.app import app

    arguments = json.loads(sys.argv[1])
    executor = Executor(
        arguments["address"],
        Path(arguments["secret"]).read_bytes(),
        app,
        installed_hashes(),
        arguments["node_config"],
    )
    with stop_on_signals(executor.stop, working=lambda: executor.working):
        executor.stay()


def _log_failure(run_id: int, error: Exception) -> None:
    """Log where a task failed, and the error's text if it is a JobError; other texts may quote examples."""
    text = str(error) if isinstance(error, JobError) else "its text is in the log at level DEBUG"
    where = "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
    logger.error("a task of run %d failed: %s: %s\n%s", run_id, type(error).__name__, text, where)
    logger.debug("the failure in full", exc_info=error)


def bundle_hashes(fab: bytes) -> dict[str, str]:
    """The hashes of the server's installed code, by file name, read from a run's bundle in memory.

    Raises:
        CodeDiffers: the bundle has no readable hashes, or too many.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            if archive.getinfo(HASHES).file_size > LARGEST_HASHES:
                raise CodeDiffers(f"the run's bundle has more than {LARGEST_HASHES} bytes of hashes")
            hashes = json.loads(archive.read(HASHES))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise CodeDiffers(f"the run's bundle doesn't say which code the server has: {error}") from None
    if not isinstance(hashes, dict):
        raise CodeDiffers("the run's bundle doesn't say which code the server has")
    return {str(name): str(value) for name, value in hashes.items()}


class _Client(RuntimeHttpClient):
    """Flower's runtime client, whose calls wait for a message that arrives later than its task.

    If the run is stopped in between, Flower 1.41 drops the message but leaves the task; this is noticed only
    by the SuperNode having a next task.
    """

    has_next_task: Callable[[], bool] = staticmethod(lambda: False)
    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        for _ in self._waiting():
            if (answer := super().PullMessages(request)).messages_list:
                break
        return answer

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        for _ in self._waiting():
            answer = super().PullObject(request)
            if answer.object_available or not answer.object_found:
                break
        return answer

    def _waiting(self) -> Iterator[None]:
        yield
        look = time.monotonic() + LONGEST_PAUSE
        while True:
            time.sleep(ARRIVAL_SECONDS)
            if self.stopping():
                raise RuntimeError("the site is to stop, and its message has not arrived")
            if time.monotonic() > look:
                look = time.monotonic() + LONGEST_PAUSE
                if self.has_next_task():
                    raise RuntimeError("its run was stopped before its message had arrived")
            yield


@contextmanager
def _connection(address: str, proof: ProtobufClientInterceptor) -> Iterator[_Client]:
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    client = _Client.from_server_address(address, True, None, interceptors=[version, proof])
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Within, heartbeats tell the SuperNode that the task is being worked on."""

    def beat() -> bool:
        try:
            return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPError:
            return False

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


class _PacedTime:
    """Replaces the module `time` in the SuperNode's loop, whose pauses of 3 s and 0.5 s are hard-coded."""

    def __init__(self) -> None:
        self._pace = PollInterval()

    def sleep(self, seconds: float) -> None:
        if seconds < 3:
            self._pace.worked()
            time.sleep(min(seconds, 0.02))
        else:
            time.sleep(min(seconds, self._pace.seconds))


def supernode() -> None:
    """Run Flower's SuperNode, polling often while a run goes on; the entry point of a child process.

    If one of its threads ends, the whole process exits, and is started again. Flower 1.41 by itself stays
    disconnected when a connection breaks in its TLS handshake, because the thread of its HTTP server goes on;
    and it stops sending heartbeats when the SuperLink answers one with an error, because their thread ends.
    """
    vars(start_client_internal)["time"] = _PacedTime()
    vars(heartbeat)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS
    pull_objects.__kwdefaults__ = {**(pull_objects.__kwdefaults__ or {}), "initial_backoff": ARRIVAL_SECONDS}
    threading.excepthook = _end_with_thread
    flower_supernode()
    _end("the SuperNode's connection has ended")


def _end_with_thread(failed: threading.ExceptHookArgs) -> None:
    _end(f"a thread of the SuperNode ended: {failed.exc_type.__name__}: {failed.exc_value}")


def _end(why: str) -> None:
    """Exit this process at once, whatever threads are running; `why` goes to standard error."""
    sys.stderr.write(f"{why}\n")
    sys.stderr.flush()
    os._exit(1)
