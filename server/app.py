"""A toy ServerApp, until the real one is here."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

app = ServerApp()
LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Some rounds in which every site adds one to the arrays; the last replies go to `out`."""
    job = json.loads(str(context.run_config["job"]))
    out = Path(str(context.run_config["out"]))
    out.mkdir(parents=True, exist_ok=True)
    names = wait_for_sites(grid, job["sites"])
    arrays = {
        f"a{i}": i + np.arange(job.get("size", 4), dtype=np.float32) for i in range(job.get("arrays", 2))
    }
    rounds = []
    for number in range(1, job["rounds"] + 1):
        began = time.monotonic()
        replies = one_round(grid, names, arrays, job, number)
        rounds.append({"round": number, "seconds": time.monotonic() - began, "replies": replies})
        logging.getLogger("flwr").info("round %d: %.2f s", number, rounds[-1]["seconds"])
        arrays = {name: array + 1 for name, array in arrays.items()}
        (out / "rounds.json").write_text(json.dumps(rounds))
    if job.get("fail_server"):
        raise RuntimeError("the toy was asked to fail")


def wait_for_sites(grid: Grid, number: int) -> dict[int, str]:
    while True:
        names = {node.node_id: node.name for node in grid.get_nodes()}
        if len(names) >= number:
            return names
        time.sleep(0.3)


def one_round(
    grid: Grid, names: dict[int, str], arrays: dict[str, Any], job: dict[str, Any], number: int
) -> dict[str, object]:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    content = RecordDict({"arrays": record, "config": ConfigRecord(job.get("config", {}))})
    replies: dict[str, object] = {}
    sent: dict[str, int] = {}
    pushed = -math.inf
    while len(replies) < len(names):
        if time.monotonic() - pushed > 15:
            left = [node for node, name in names.items() if name not in replies]
            sent, pushed = sent | push(grid, content, left, number), time.monotonic()
        for reply in grid.pull_messages(sent):
            node = sent.pop(reply.metadata.reply_to_message_id)
            if not (reply.has_error() and reply.error.code in LOST):
                replies[names[node]] = read(reply, arrays)
        time.sleep(0.1)
    return replies


def push(grid: Grid, content: RecordDict, nodes: list[int], number: int) -> dict[str, int]:
    """Send to the nodes; returns which message went to which."""
    while True:
        messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
        try:
            return dict(zip(grid.push_messages(messages), nodes, strict=True))
        except ObjectPushError:
            logger.warning("the SuperLink went away in the middle of a push; pushing again")


def read(reply: Message, sent: dict[str, Any]) -> object:
    if reply.has_error():
        return {"error": reply.error.reason}
    arrays = reply.content.array_records["arrays"]
    exact = all(np.array_equal(arrays[name].numpy(), sent[name] + 1) for name in sent)
    return {**dict(reply.content.config_records["who"]), "exact": exact}
