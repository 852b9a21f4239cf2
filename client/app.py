"""The client as a Flower ClientApp: Flower's messages in, the site's answers out.

Names of several clients can travel in one message: a site may host more than one, and an
engine sends them in blocks. Bodies are safetensors bytes in an array record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.books import Books
from client.memory import Memory
from client.shards import FolderShards
from client.site import Site
from protocol.errors import DataError
from protocol.job import Job
from protocol.kit import Budget
from protocol.messages import decode_request, encode_reply, hello_to_json

logger = logging.getLogger(__name__)

SiteOf = Callable[[Job, Context], Site]
"""Which site answers in this process, given the job and Flower's context."""

_sites: dict[tuple[str, str], Site] = {}
_answered: dict[str, list[tuple[str, str, bytes]]] = {}
"""The last request, and the replies to it: client, head, body."""


def folder_site(job: Job, context: Context) -> Site:
    """The resident site of a real SuperNode, which names its client and its data."""
    config = context.node_config
    name, paths = key = (str(config["name"]), str(config["data-paths"]))
    if key not in _sites:
        shards = FolderShards.of(name, [Path(p) for p in json.loads(paths)])
        budget = str(config["budget"])
        books = Books(Path(str(config["ledgers"])), Budget.model_validate_json(budget) if budget else None)
        memory = Memory(Path(str(config["memory"])))
        _sites[key] = Site(shards, discreet=True, books=books, memory=memory)
    return _sites[key]


def register(app: ClientApp, site_of: SiteOf) -> None:
    """Give a ClientApp its three handlers."""

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        job = Job.from_json(_text(message, "job"))
        hellos = site_of(job, context).hello(job)
        for h in (h for h in hellos if not h.refusal):
            logger.info("job %s: %s has %d examples for it", job.name, h.client, h.num_examples)
        texts = [hello_to_json(h) for h in hellos]
        return Message(RecordDict({"hellos": ConfigRecord({"json": texts})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return work(message, context, site_of)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return work(message, context, site_of)


def work(message: Message, context: Context, site_of: SiteOf) -> Message:
    """Replies of the clients that the message names, each with its own head and body.

    A request that comes again, because the reply was lost on its way, gets the same reply.
    """
    head, names = _text(message, "request"), _text(message, "names")
    asked = hashlib.sha256(b"\0".join((head.encode(), names.encode(), _body(message)))).hexdigest()
    if asked not in _answered:
        request = decode_request(head, _body(message))
        job = Job.from_json(request.job)
        with timed(f"round {request.round} of {job.name}: {request.kind} {', '.join(json.loads(names))}"):
            answers = site_of(job, context).answer(request, json.loads(names))
            replies = [(r.client, *encode_reply(r)) for r in answers]
        _answered.clear()
        _answered[asked] = replies
    bodies = ArrayRecord({name: bytes_array(body) for name, _, body in _answered[asked]})
    heads = ConfigRecord({name: head for name, head, _ in _answered[asked]})
    return Message(RecordDict({"bodies": bodies, "heads": heads}), reply_to=message)


@contextmanager
def timed(work: str) -> Iterator[None]:
    """Say what is begun, and how long it took."""
    logger.info("%s", work)
    began = time.monotonic()
    yield
    logger.info("%s: done in %.1f s", work, time.monotonic() - began)


def bytes_array(body: bytes) -> Array:
    """Bytes as one of Flower's arrays, which it cuts into pieces and streams."""
    return Array(dtype="uint8", shape=(len(body),), stype="safetensors", data=body)


def _text(message: Message, key: str) -> str:
    try:
        return cast(str, message.content.config_records["head"][key])
    except KeyError:
        raise DataError(f"message without {key!r}: sent by another version of Atoll?") from None


def _body(message: Message) -> bytes:
    return message.content.array_records["body"]["tensors"].data


app = ClientApp()
register(app, folder_site)
