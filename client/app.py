"""The client as a Flower ClientApp, which passes Flower's messages to a site and returns its answers.

One message can name several clients: a site may host more than one, and an engine sends them in blocks.
Bodies are safetensors bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from atoll.client.audit_log import AuditLog
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.client.local_data import FolderShards
from atoll.client.policy import Policy
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.job.privacy import uses_secure_aggregation
from atoll.kit.kit import Budget
from atoll.kit.roster import SiteIdentity
from atoll.kit.signed_replies import GREETING_ROUND, Contents, Exchange, ReplySigner
from atoll.protocol.flower_content import NONCE, add_seal, bodies_of, packed, packed_greetings, unpacked
from atoll.protocol.messages import Failure, Hello, encode_reply, hello_to_json
from atoll.protocol.requests import decode_request, work_name

logger = logging.getLogger(__name__)

Content = TypeVar("Content", str, bytes)

SiteOf = Callable[[Job, Context], Site]
"""A function that returns the site of this process, given the job and Flower's context."""

_sites: dict[tuple[str, str], Site] = {}
_answered: dict[str, dict[str, tuple[str, bytes]]] = {}
"""(head, body) of each client's reply to the last request, by request and client; failures are left out."""


def folder_site(job: Job, context: Context) -> Site:
    """The site of a real SuperNode, whose configuration names its clients and their data."""
    config = context.node_config
    name, paths = key = (str(config["name"]), str(config["data-paths"]))
    if key not in _sites:
        shards = FolderShards.of(name, [Path(p) for p in json.loads(paths)])
        budget = str(config["budget"])
        ledgers = PrivacyLedgers(
            Path(str(config["ledgers"])), Budget.model_validate_json(budget) if budget else None
        )
        memory = ClientStateStore(Path(str(config["memory"])))
        kit = Path(str(config["kit"]))
        _sites[key] = Site(
            shards, discreet=True, ledgers=ledgers, memory=memory, policy=Policy.load(kit),
            audit=AuditLog.open(kit / "state"),
            secure_session=SecureAggregationSession(identity=SiteIdentity.load(kit)),
            signer=ReplySigner.load(kit),
        )  # fmt: skip
    return _sites[key]


def register(app: ClientApp, site_of: SiteOf) -> None:
    """Give a ClientApp its three handlers."""

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        texts, _ = unpacked(message.content)
        job = Job.from_json(_part(texts, "job"))
        site = site_of(job, context)
        hellos = site.hello(job)
        tell_operator(job, hellos)
        if site.audit is not None:
            site.audit.greeted(job, hellos)
        greetings = {h.client: (hello_to_json(h), b"") for h in hellos}
        content = packed_greetings([text for text, _ in greetings.values()])
        _sign(content, site, Exchange(job.hash, GREETING_ROUND, texts.get(NONCE, "")), greetings)
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return work(message, context, site_of)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return work(message, context, site_of)


def work(message: Message, context: Context, site_of: SiteOf) -> Message:
    """A message with the replies of the clients that the given message names, each as head and body.

    If the same request comes again, because replies were lost or too few, clients send the same replies as
    before; those that failed try again.
    """
    texts, bodies = unpacked(message.content)
    head, names, body = _part(texts, "request"), _part(texts, "names"), _part(bodies, "tensors")
    request_sha256 = hashlib.sha256(b"\0".join((head.encode(), names.encode(), body))).hexdigest()
    clients = _names(names)
    answered = _answered.get(request_sha256, {})
    replies = dict(answered)
    request = decode_request(head, body)
    job = Job.from_json(request.job)
    site = site_of(job, context)
    if to_do := [name for name in clients if name not in answered]:
        with timed(f"round {request.round} of {job.name}: {work_name(request)} {', '.join(to_do)}"):
            for made in site.answer(request, to_do):
                reply = made if isinstance(made, Failure) else replace(made, run=request.run)
                encoded = encode_reply(reply)
                if site.audit is not None:
                    site.audit.answered(job, request, reply, *encoded)
                replies[reply.client] = encoded
                if not isinstance(reply, Failure):
                    answered[reply.client] = encoded
        _answered.clear()
        _answered[request_sha256] = answered
    sent = bodies_of({name: body for name, (_, body) in replies.items()})
    content = packed({name: head for name, (head, _) in replies.items()}, sent)
    _sign(content, site, Exchange(request.run, request.round, texts.get(NONCE, "")), replies)
    return Message(content, reply_to=message)


def _sign(content: RecordDict, site: Site, exchange: Exchange, contents: Contents) -> None:
    """Sign each client's part of a message that answers a request; a simulated site has no key."""
    if site.signer is not None:
        add_seal(content, site.signer.seal(exchange, contents))


def tell_operator(job: Job, hellos: Sequence[Hello]) -> None:
    """Log the job's terms, and what each client tells the server about itself or why it refuses."""
    logger.info("job %s asks for %s", job.name, describe_terms(job))
    for hello in hellos:
        if hello.refusal:
            logger.warning("job %s: %s does not take part: %s", job.name, hello.client, hello.refusal)
            continue
        held = f"has {hello.num_examples} examples for it" if hello.num_examples else "takes part"
        logger.info("job %s: %s %s%s", job.name, hello.client, held, describe_facts(hello))


def describe_terms(job: Job) -> str:
    """A job's terms in one line, which a site's operator sees before anything is sent to the server.

    >>> from atoll import load_job
    >>> describe_terms(load_job("jobs/mnist.toml"))
    'image-classification by torchvision:mobilenet_v2, tuned head, 30 rounds; no promise of privacy'
    """
    columns = job.data.named_columns
    named = [f"{key.rpartition('.')[2]} in column {column!r}" for key, column in columns.items()]
    units = " and ".join(f"each {unit}" for unit in job.privacy.units)
    parts = [
        f"{job.task.name} by {job.backbone.name}, tuned {job.tune.method}, {job.federation.rounds} rounds",
        *([", ".join(named)] if named else []),
        f"a promise of privacy to {units}" if units else "no promise of privacy",
        *(["a secure sum"] if uses_secure_aggregation(job) else []),
    ]
    return "; ".join(parts)


def describe_facts(hello: Hello) -> str:
    """What a greeting reveals about the data besides the number of examples, in one line."""
    facts = [
        f"{len(value)} {name}" if isinstance(value, list) else f"{name} {value}"
        for name, value in hello.data_info.items()
    ]
    return f" and tells the server {', '.join(facts)}" if facts else ""


@contextmanager
def timed(work: str) -> Iterator[None]:
    """Log when the work in the block begins, and how long it took."""
    logger.info("%s", work)
    began = time.monotonic()
    yield
    logger.info("%s: done in %.1f s", work, time.monotonic() - began)


def _names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError("message whose names are no list of names: it was changed on its way")
    return names


def _part(contents: Mapping[str, Content], key: str) -> Content:
    try:
        return contents[key]
    except KeyError:
        raise DataError(f"message without {key!r}: sent by another version of Atoll?") from None


app = ClientApp()
register(app, folder_site)
