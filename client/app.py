"""A toy ClientApp, until the real one is here."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    content = RecordDict({"who": ConfigRecord({"name": str(context.node_config["name"])})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adds one to every array, counts its rounds, sleeps or fails where it is asked to."""
    config = message.content.config_records["config"]
    (Path(str(context.node_config["data-path"])) / "working").touch()
    time.sleep(float(config.get("sleep", 0.0)))  # type: ignore[arg-type]
    if config.get("fail") == context.node_config["name"]:
        raise ValueError(f"row 17 of {config['secret']!r} is wrong")
    seen = context.state.config_records.get("seen", ConfigRecord({"rounds": 0}))
    seen["rounds"] = int(seen["rounds"]) + 1  # type: ignore[arg-type]
    context.state["seen"] = seen
    arrays = message.content.array_records["arrays"]
    moved = ArrayRecord({name: Array(np.asarray(array.numpy() + 1)) for name, array in arrays.items()})
    name = str(context.node_config["name"])
    who = ConfigRecord(
        {"name": name, "rounds": seen["rounds"], "data": str(context.node_config["data-path"])}
    )
    return Message(RecordDict({"arrays": moved, "who": who}), reply_to=message)
