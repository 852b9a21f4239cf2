"""Networks with 8-bit linear layers by torchao: one safetensors file, and what builds the network anew."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from atoll.backbones.encoder import Model
from atoll.backbones.resolve import Backbone
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.tasks import task_named

FILE = "model.safetensors"
ABOUT = "model.json"
BACKBONE, SECOND = "backbone", "text"
"""Folders of the files beside a transformers network's weights, and beside those of `image-text`'s second."""


def check_installed() -> None:
    """Raises ConfigError unless torchao is here."""
    try:
        with _quietly():
            import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format torchao-int8: {error.name} is not installed: pip install 'atoll[torchao]'"
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Within, torch says nothing of how torchao 0.18 registers its enums."""
    speaking = logging.getLogger("torch.utils._pytree")
    before = speaking.level
    speaking.setLevel(logging.ERROR)
    try:
        yield
    finally:
        speaking.setLevel(before)


def quantise(model: Model) -> int:
    """Turn the backbone's linear layers to 8-bit integers, in place; how many there were.

    Weights have a scale for each output; what flows in is made 8-bit for every row as it comes (dynamic).
    The head and tables of embeddings stay as they are: torchao 0.18 makes a whole 8-bit table float again
    for every look into it.

    Raises:
        ConfigError: there is no such layer.
    """
    with _quietly():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = {id(m) for m in model.backbone.modules() if _is_linear(m)}
        linear -= {id(m) for m in model.head.modules()}
        if not linear:
            raise ConfigError(
                "--format torchao-int8: torchao turns linear layers to 8 bits, and this backbone has none,"
                " try onnx-int8"
            )
        quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda m, _: id(m) in linear)
    return len(linear)


def _is_linear(module: nn.Module) -> bool:
    # torch's attention takes the weight of such a layer and never calls it.
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def write_model(model: Model, learner: Learner, folder: Path) -> None:
    """The quantised tensors as torchao flattens them, and what builds the same network around them."""
    with _quietly():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        flat, about = flatten_tensor_state_dict(model.state_dict())
    # Weights that stand under two names are written twice: safetensors shares nothing.
    save_file({name: t.detach().clone().contiguous() for name, t in flat.items()}, folder / FILE, about)
    job = learner.job.model_dump(mode="json")
    data_info = {key: value for key, value in learner.data_info.items() if key != "backbone"}
    (folder / ABOUT).write_text(json.dumps({"job": job, "facts": data_info}) + "\n", "utf-8")
    _write_surroundings(learner.backbone, folder / BACKBONE)
    if learner.backbone.also is not None:
        _write_surroundings(learner.backbone.also, folder / SECOND)


def _write_surroundings(backbone: Backbone, folder: Path) -> None:
    """A transformers network's configuration, tokenizer and preprocessing, without its weights."""
    if backbone.folder is None:
        return
    folder.mkdir()
    for file in sorted(backbone.folder.iterdir()):
        if file.suffix in (".json", ".txt", ".model") and file.is_file():
            shutil.copy(file, folder / file.name)


def read_model(folder: Path) -> tuple[Learner, Model]:
    """What `write_model` left, ready to use; nothing else is looked for.

    Raises:
        ConfigError: torchao is not installed, or the folder is no such export.
        WeightsError: its tensors are damaged.
    """
    check_installed()
    learner = _learner_of(folder)
    model = learner.model.eval().requires_grad_(False)
    with _quietly():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        try:
            with safe_open(folder / FILE, framework="pt") as file:
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                state, rest = unflatten_tensor_state_dict(flat, file.metadata() or {})
            model.load_state_dict(state | rest, assign=True)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            why = str(error).strip().splitlines()[0]
            raise WeightsError(f"{folder / FILE}: not a model that torchao can load: {why}") from None
    return learner, model


def _learner_of(folder: Path) -> Learner:
    """Builds the network, from random weights: they are about to be replaced."""
    about = folder / ABOUT
    try:
        details: dict[str, Any] = json.loads(about.read_text("utf-8"))
        job, data_info = Job.parse(details["job"], origin=str(about)), dict(details["facts"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder}: no folder that atoll export --format torchao-int8 wrote: {error}"
        ) from None
    changes: dict[str, Any] = {"weights": "random", "compile": False}
    if (folder / BACKBONE).is_dir():
        changes["name"] = str((folder / BACKBONE).absolute())
    if (folder / SECOND).is_dir():
        changes["options"] = {**job.backbone.options, "text": str((folder / SECOND).absolute())}
    tune = {"tune": {"method": "head", "hidden": job.tune.hidden}}
    backbone = {"backbone": job.backbone.model_dump(mode="json") | changes}
    job = Job.parse(job.model_dump(mode="json") | tune | backbone, origin=str(about))
    return Learner.of(job, task_named(job.task.name), data_info)
