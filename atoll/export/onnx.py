"""ONNX files of trained models, in float or 8-bit integers, and their use through onnxruntime."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.backbones.encoder import Batch, Model
from atoll.errors import ConfigError

OUTPUT = "output"
MEANT_FOR = "classification of images, texts or both, medical images, segmentation, forecasting and survival"
WHOLE_NETWORKS = ("segmentation", "forecasting", "survival")
"""Tasks without features apart, whose networks take tensors alone."""


class _ByPosition(nn.Module):
    """The model with its batch's tensors as arguments, which ONNX names its inputs after."""

    def __init__(self, model: Model, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(dict(zip(self.names, tensors, strict=True)))
        return output


def check_installed() -> None:
    """Raises ConfigError unless the packages are here."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format: {error.name} is not installed: pip install 'atoll[export]'") from None


def write_onnx(model: Model, batch: Batch, path: Path) -> None:
    """The plain model as one file; `batch` shows its inputs, whose first axis may then be of any length.

    Of tokens the second axis too.

    Raises:
        ConfigError: the network does what ONNX, or its writer, has no words for.
    """
    examples = {name: torch.cat([t, t]) for name, t in batch.items()}
    free = [_free_axes(t) for t in examples.values()]
    try:
        with _quietly("torch.onnx"), torch.no_grad():
            program: Any = torch.onnx.export(
                _ByPosition(model, examples).eval(), tuple(examples.values()), input_names=list(examples),
                output_names=[OUTPUT], dynamo=True, dynamic_shapes=(tuple(free),), verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"--format: the network can't be written as ONNX: {why}") from None
    program.save(path)


@contextmanager
def _quietly(logger: str) -> Iterator[None]:
    """Within, that logger and Python's warnings say nothing of what isn't an error."""
    speaking = logging.getLogger(logger)
    before = speaking.level
    speaking.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        speaking.setLevel(before)


def _free_axes(tensor: torch.Tensor) -> dict[int, Any]:
    tokens = tensor.dtype == torch.int64 and tensor.dim() == 2
    return dict.fromkeys((0, 1) if tokens else (0,), torch.export.Dim.DYNAMIC)


def convolves(model: nn.Module) -> bool:
    """Whether 8-bit integers need examples to find their ranges: activations between convolutions do."""
    return any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in model.modules())


def quantise(file: Path, path: Path, batches: Iterable[Batch] | None) -> None:
    """8-bit weights, a scale for each channel.

    With `batches` activations are 8-bit too, in ranges that these show (static quantisation); without,
    ranges are found anew for every input (dynamic), which suits networks of matrix products. The first third
    of a row of convolutions stays in float: it has a few hundredths of the weights, and its errors go through
    all that follows.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quietly("root"):
        if batches is None:
            quantize_dynamic(file, path, weight_type=QuantType.QInt8, per_channel=True)
            return
        ready = path.with_suffix(".ready.onnx")
        quant_pre_process(file, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, path, _Reader(batches), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            op_types_to_quantize=PRODUCTS, nodes_to_exclude=_first_third(ready),
        )  # fmt: skip
        ready.unlink()


PRODUCTS = ["Conv", "Gemm", "MatMul"]
FEWEST_CONVOLUTIONS = 6
"""A network with fewer has no row of them: a transformer for images begins with one."""


def _convolutions(file: Path) -> list[int]:
    """Places of the convolutions among the file's nodes."""
    import onnx

    places = [place for place, node in enumerate(onnx.load(file).graph.node) if node.op_type == "Conv"]
    return places if len(places) >= FEWEST_CONVOLUTIONS else []


def _first_third(file: Path) -> list[str]:
    """Names of the nodes before the convolution at a third of all."""
    import onnx

    places = _convolutions(file)
    end = places[len(places) // 3] if places else 0
    return [node.name for node in onnx.load(file).graph.node[:end]]


class _Reader:
    """Batches as onnxruntime asks for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._left: Iterator[Batch] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {name: t.numpy() for name, t in batch.items()}


def model_of(path: Path, like: Model, threads: int) -> Model:
    """The file behind the face of the model that it was made of."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(batch: Batch) -> torch.Tensor:
        outputs = session.run([OUTPUT], {name: t.numpy() for name, t in batch.items()})
        return torch.from_numpy(outputs[0])

    model = copy.copy(like)
    model.forward = forward  # type: ignore[method-assign]
    return model
