"""How a network takes its inputs, and how it takes states in their place.

States travel in the input's place in a batch. They are told from inputs by what inputs never are: tokens are
integers and their states are not; pictures have four dimensions and their states, flattened, have five.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import torch
from torch import nn

from atoll.backbones.encoder import FixedInput, Model, in_layout
from atoll.errors import ConfigError

PROBE = 8
"""The number of tokens in the sequence with which a network is tested."""

FLAT = 5
"""The dimensions of states in a fixed input's place: [n, 1, 1, 1, numbers]."""


class NetworkInputs(Protocol):
    """How one network is called."""

    def probe(self, device: torch.device) -> torch.Tensor:
        """One example's input, to test a network with: [1, …]."""

    def run(self, inputs: torch.Tensor) -> Any:
        """What is made of inputs [n, …], or of states as `place_states` returns them."""

    def ways_to_skip(self, blocks: list[nn.Module], layers: list[nn.Module]) -> list[list[nn.Module]]:
        """Which frozen blocks, and layers between them, to skip where there are states; best way first."""

    def expect_states(self, shape: torch.Size) -> None:
        """Take note of the shape of one example's states, before any are placed."""

    def place_states(self, states: torch.Tensor) -> torch.Tensor:
        """States [n, …] as they are put into the place of the inputs; numbers behind them are left out."""

    def states_in(self, args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor | None:
        """The states [n, …] among the arguments of a call; None if these are inputs."""

    def blank(self, states: torch.Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The arguments (args, named) of a call with empty inputs in the place of the states."""


class TokenInputs:
    """Of networks whose only inputs are `input_ids` and `attention_mask`; states are [n, tokens, width]."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._options = {}
        if "use_cache" in inspect.signature(network.forward).parameters:
            self._options = {"use_cache": False}

    def probe(self, device: torch.device) -> torch.Tensor:
        return torch.zeros((1, PROBE), dtype=torch.int64, device=device)

    def run(self, inputs: torch.Tensor) -> Any:
        mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        return self._network(input_ids=inputs, attention_mask=mask, **self._options)

    def ways_to_skip(self, blocks: list[nn.Module], layers: list[nn.Module]) -> list[list[nn.Module]]:
        """The blocks alone: a layer between them may tell positions."""
        return [blocks]

    def expect_states(self, shape: torch.Size) -> None:
        """Nothing: the states of texts differ in length."""

    def place_states(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def states_in(self, args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor | None:
        given: torch.Tensor | None = named.get("input_ids")
        return given if given is not None and given.is_floating_point() else None

    def blank(self, states: torch.Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        ids = torch.zeros(states.shape[:-1], dtype=torch.int64, device=states.device)
        return args, named | {"input_ids": ids}


class FixedInputs:
    """Of models whose only input is one tensor, of the same shape for every example."""

    def __init__(self, model: Model, given: FixedInput) -> None:
        self._model = model
        self._given = given
        self._states = torch.Size()
        self._argument = torch.Size(given.shape)
        """The shape in which the network is given an example's input; its encoder may turn it round."""

    def probe(self, device: torch.device) -> torch.Tensor:
        # Not zeros: a network may make zeros of them, which look like the absence of states.
        numbers = math.prod(self._given.shape)
        return torch.linspace(-2, 2, numbers, device=device).view(1, *self._given.shape)

    def run(self, inputs: torch.Tensor) -> Any:
        beside = {
            name: torch.full((len(inputs),), value, device=inputs.device)
            for name, value in self._given.beside.items()
        }
        return self._model({self._given.name: inputs} | beside)

    def ways_to_skip(self, blocks: list[nn.Module], layers: list[nn.Module]) -> list[list[nn.Module]]:
        """All; else the blocks; else not the first one or two, which may make rows of a picture or sound."""
        return [[*blocks, *layers], blocks, *(blocks[n:] for n in (1, 2) if len(blocks) > n)]

    def expect_states(self, shape: torch.Size) -> None:
        self._states = shape

    def place_states(self, states: torch.Tensor) -> torch.Tensor:
        return states.reshape(len(states), 1, 1, 1, -1)[..., : self._states.numel()]

    def states_in(self, args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor | None:
        given = args[0] if args else None
        if not isinstance(given, torch.Tensor):
            return None
        if given.dim() != FLAT:
            self._argument = given.shape[1:]
            return None
        return in_layout(given.reshape(-1, *self._states), self._given.layout)

    def blank(self, states: torch.Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        empty = states.new_zeros((len(states), *self._argument))
        return (in_layout(empty, self._given.layout), *args[1:]), named


def inputs_of(model: Model) -> NetworkInputs:
    """How a model's network is called.

    Raises:
        ConfigError: it takes inputs of another kind.
    """
    encoder = model.backbone
    if encoder.reads_tokens:
        return TokenInputs(encoder.model)
    if encoder.fixed_input is not None:
        return FixedInputs(model, encoder.fixed_input)
    raise ConfigError(
        "train.cached_states: states are kept of networks that read nothing but tokens (causal models,"
        " encoders of texts), pictures of one size (classifiers, segmenters), or windows of sound (Whisper),"
        " expected none for this one"
    )
