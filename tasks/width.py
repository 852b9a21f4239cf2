"""How wide a backbone's features are, where it can be told without its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tasks.vision_encoder import torchvision_width
from tasks.weights import Backbone


def known_width(backbone: Backbone) -> int | None:
    """The width of a backbone's features, where it can be told without loading the weights."""
    if backbone.also is not None:
        widths = known_width(replace(backbone, also=None)), known_width(backbone.also)
        return None if None in widths else sum(w for w in widths if w is not None)
    if backbone.kind == "torchvision":
        return torchvision_width(backbone.name)
    if backbone.kind == "raw":
        return None
    written = json.loads((Path(backbone.folder or "") / "config.json").read_text("utf-8"))
    if isinstance(written.get("hidden_size"), int):
        return int(written["hidden_size"])
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    return getattr(config, "hidden_size", None)
