"""Folders that transformers and peft read: the network, its tokenizer, the head, LoRA's factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atoll.backbones.encoder import Model
from atoll.errors import ConfigError
from atoll.export.lora_adapter import write_adapter
from atoll.export.safetensors import adapters, make_plain, tensors_of
from atoll.job.job import Job
from atoll.protocol.tensors import to_bytes

HEAD = "head.safetensors"
ADAPTER = "adapter"


def network_of(model: Model) -> Any:
    """The transformers network inside a model.

    Raises:
        ConfigError: there is none.
    """
    network = getattr(model.backbone, "model", None)
    if not hasattr(network, "save_pretrained"):
        raise ConfigError("--format huggingface: the run's backbone is no transformers network, try onnx")
    return network


def write_folder(model: Model, job: Job, folder: Path) -> None:
    """`from_pretrained` reads the network; a head outside of it is a file beside.

    LoRA's factors are merged into the network, and also there on their own, in `adapter`, as peft has
    them. The model is plain afterwards.
    """
    network = network_of(model)
    if layers := adapters(network):
        write_adapter(layers, job, folder / ADAPTER)
    make_plain(model)
    network.save_pretrained(folder)
    write_tokenizer(model, folder)
    if not any(module is model.head for module in network.modules()):
        (folder / HEAD).write_bytes(to_bytes(tensors_of(model.head)))


def write_tokenizer(model: Model, folder: Path) -> None:
    """The tokenizer's files, if the model has one of transformers."""
    tokenizer: Any = getattr(model.backbone, "_tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


def read_network(model: Model, folder: Path) -> None:
    """Replace the model's network by what transformers reads from the folder.

    Raises:
        ConfigError: it has no words for a shape that pruning has left.
    """
    network = network_of(model)
    try:
        model.backbone.model = type(network).from_pretrained(folder, local_files_only=True).eval()
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--format huggingface: transformers can't build the network in this shape, try onnx: {why}"
        ) from None
