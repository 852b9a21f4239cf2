"""The server as a Flower ServerApp: the rounds, over whatever Flower's grid reaches."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from protocol.errors import DataError, InconsistentUpdates, JobError
from protocol.job import Job
from protocol.messages import Hello, Reply, Request, decode_reply, encode_request, hello_from_json
from server.play import play
from server.testset import server_test_set

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
MARK = "atoll: "
"""Stands before our lines in a log that is Flower's too."""


@dataclass
class FlowerCarrier:
    """Brings requests to the nodes behind a Flower grid, and knows which client lives at which node."""

    grid: Grid
    engine: str
    nodes: dict[str, int] = field(default_factory=dict)
    quiet: set[int] = field(default_factory=set)
    greeted: dict[int, list[Hello]] = field(default_factory=dict)

    def hello(self, job: Job) -> list[Hello]:
        """Ask every node who lives there, until the job's number of clients is there.

        Raises:
            InconsistentUpdates: they weren't there after `federation.wait` seconds.
        """
        needed, deadline = job.federation.clients, time.monotonic() + job.federation.wait
        told = -1
        while True:
            self._greet(job, deadline)
            hellos = [h for node in self.greeted.values() for h in node]
            if len(hellos) >= needed:
                return self._accept(hellos)
            if len(hellos) != told:
                told = len(hellos)
                logger.info("%d of %d clients are here, waiting for the others", told, needed)
            if time.monotonic() > deadline:
                raise InconsistentUpdates(
                    f"{len(hellos)} of {needed} clients joined within {job.federation.wait:.0f} s:"
                    f" {', '.join(sorted(h.client for h in hellos)) or 'none'}"
                )
            time.sleep(POLL_SECONDS)

    def _greet(self, job: Job, deadline: float) -> None:
        strangers = [node for node in self.grid.get_node_ids() if node not in self.greeted]
        content = RecordDict({"head": ConfigRecord({"job": job.canonical})})
        messages = [Message(content, dst_node_id=node, message_type="query") for node in strangers]
        for reply in self._replies(messages, min(60.0, deadline - time.monotonic())):
            if reply.has_error():
                logger.warning("node %d: %s", reply.metadata.src_node_id, reply.error.reason)
                continue
            texts = reply.content.config_records["hellos"]["json"]
            self.greeted[reply.metadata.src_node_id] = [hello_from_json(t) for t in texts]  # type: ignore[union-attr, arg-type]

    def _accept(self, hellos: list[Hello]) -> list[Hello]:
        """The first to bear a name keeps it; a second one is refused by name."""
        by_name: dict[str, Hello] = {}
        for node in sorted(self.greeted):
            for hello in self.greeted[node]:
                if hello.client in by_name:
                    logger.warning("two nodes call themselves %s: the second is left out", hello.client)
                    continue
                by_name[hello.client] = hello
                self.nodes[hello.client] = node
        return [by_name[name] for name in sorted(by_name)]

    def exchange(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        """One message for every node that hosts any of the named clients; their replies one by one."""
        head, body = encode_request(request)
        tensors = ArrayRecord(
            {"tensors": Array(dtype="uint8", shape=(len(body),), stype="safetensors", data=body)}
        )
        messages = []
        for node, clients in self._by_node(names).items():
            config = ConfigRecord({"request": head, "names": json.dumps(clients)})
            content = RecordDict({"head": config, "body": tensors})
            messages.append(Message(content, dst_node_id=node, message_type=request.kind, ttl=timeout + 60))
        for reply in self._replies(messages, timeout):
            if reply.has_error():
                logger.warning("node %d: %s", reply.metadata.src_node_id, reply.error.reason)
                continue
            yield from _decoded(reply)

    def _by_node(self, names: Sequence[str]) -> dict[int, list[str]]:
        hosts: dict[int, list[str]] = {}
        for name in names:
            hosts.setdefault(self.nodes[name], []).append(name)
        return hosts

    def _replies(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Replies as they come, until all are there or the time is up."""
        waiting = set(self.grid.push_messages(messages))
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if waiting:
                time.sleep(POLL_SECONDS)


def _decoded(reply: Message) -> Iterator[Reply]:
    """The clients' replies in one message; an unreadable one is dropped and named in the log."""
    bodies = reply.content.array_records["bodies"]
    for name, head in reply.content.config_records["heads"].items():
        try:
            decoded = decode_reply(str(head), bodies[name].data)
        except (DataError, KeyError) as error:
            logger.warning("reply of %s cannot be read: %s", name, error)
            continue
        if decoded.client == name:
            yield decoded
        else:
            logger.warning("a reply of %s calls itself %s: dropped", name, decoded.client)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the job that the run's configuration carries; results go to its `out`."""
    speak_up()
    job = Job.from_json(str(context.run_config["job"]))
    out = Path(str(context.run_config["out"]))
    resume = (out / "job.toml").is_file()
    carrier = FlowerCarrier(grid, "flower")
    try:
        play(job, carrier, out, server_test_set(job), watch=announce, resume=resume)
    except JobError as error:
        logger.error("error: %s", error)
        raise


def speak_up() -> None:
    """Write our own log lines to standard output, which Flower carries to `atoll submit` and `logs`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(MARK + "%(message)s"))
    for room in ("server", "strategies", "tasks"):
        logging.getLogger(room).addHandler(handler)
        logging.getLogger(room).setLevel(logging.INFO)


def announce(step: str, what: dict[str, Any]) -> None:
    """A line for every step of the run."""
    match step:
        case "hello":
            taking = [h.client for h in what["hellos"] if not h.refusal]
            logger.info("clients   %s", ", ".join(taking))
            logger.info("backbone  %s, weights from %s", what["backbone"].name, what["backbone"].origin)
        case "resumed":
            logger.info("resumed after round %d", what["round"])
        case "round":
            logger.info("%s", round_in_words(what))
        case "finish":
            logger.info("final measurements")


def round_in_words(line: dict[str, Any]) -> str:
    """A round's line for people: number, loss, metrics, seconds, how many were set aside."""
    parts = [] if line["loss"] is None else [f"loss {line['loss']:.3f}"]
    parts += [f"{name} {value:.3f}" for name, value in line["metrics"].items() if name != "loss"]
    parts += [f"{len(line['set_aside'])} set aside"] if line["set_aside"] else []
    return f"round {line['round']:<4} {', '.join(parts)}  ({line['seconds']:.1f} s)"
