"""A network split into a frozen prefix, the blocks before the first tuned one, and the rest after it.

The prefix is computed for one example at a time, without padding, so an example's hidden states depend on
its own input alone. If a batch has such states in its inputs' place, the network skips the prefix and starts
with them at the first tuned block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from atoll.backbones.checkpoint import attention, attention_of
from atoll.backbones.encoder import Model
from atoll.backbones.extract import side_by_side, workers_on
from atoll.errors import ConfigError, DataError
from atoll.learning import trainable
from atoll.learning.prefix.network_inputs import inputs_of
from atoll.protocol.random_streams import global_stream

BEYOND = (
    "train.cached_states: the tuned blocks of this network take more than the states of the block below them;"
    " remove the key"
)


class _Reached(Exception):
    """Raised when the first tuned block is reached, to skip the rest of the network."""


class FrozenPrefix:
    """Splits one network into prefix and rest; from then on the network accepts states as well as inputs.

    Raises:
        ConfigError: the network takes inputs of another kind, its first block is tuned, the rest uses more
            of the prefix than its last block's states, or dropout is active in the prefix.
    """

    def __init__(self, model: Model) -> None:
        self._inputs = inputs_of(model)
        self.network: Any = model.backbone.model
        self._attention = attention_of(self.network)
        self._local = threading.local()
        self._replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        blocks = self._blocks(model.head)
        calls = self._calls([*blocks, *_layers_outside(self.network, blocks)])
        called = [block for block in dict.fromkeys(calls) if block in blocks]
        # Where a head on top of the network is tuned alone, the last block is computed again.
        last = len(called) - 1
        self.frozen = called[: next((n for n, block in enumerate(called) if _is_tuned(block)), last)]
        if not self.frozen:
            raise ConfigError(
                "train.cached_states: the first block of this network is tuned, expected frozen blocks below"
                " tuned ones; name fewer tune.layers, or remove the key"
            )
        self.first = called[len(self.frozen)]
        at = calls.index(self.first)
        self._between = [layer for layer in calls[:at] if layer not in blocks and layer not in calls[at:]]
        self.skipped: list[nn.Module] = []
        """The modules that aren't computed where there are states."""
        self.network.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.network.register_forward_hook(self._end, always_call=True)
        self.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._check(model)

    @property
    def place(self) -> list[str]:
        """Identifies the split: the network's class, and the names of its frozen and first tuned blocks."""
        names = {id(module): name for name, module in self.network.named_modules()}
        return [type(self.network).__qualname__, *(names[id(block)] for block in [*self.frozen, self.first])]

    def states(self, example: torch.Tensor) -> torch.Tensor:
        """The input of the first tuned block for one example's input: float32, contiguous.

        Of tokens [tokens] the states are [tokens, width], of pictures what the network makes of them. The
        network must be in evaluation mode, as it is within `states_of_each`.
        """
        self._local.captured = None
        self._local.captures = True
        try:
            with torch.inference_mode():
                self._inputs.run(example[None].to(_device(self.network)))
        except _Reached:
            captured = self._local.captured
        finally:
            self._local.captures = False
        if not isinstance(captured, torch.Tensor) or len(captured) != 1:
            raise ConfigError(BEYOND)
        return captured[0].to("cpu", torch.float32).contiguous()

    def placed(self, states: torch.Tensor) -> torch.Tensor:
        """States [n, …] as the network takes them in its inputs' place."""
        return self._inputs.place_states(states)

    def states_of_each(
        self, examples: Sequence[torch.Tensor], *, threads: int, done: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """The states of each example's input, as `states` returns them, computed by one worker per core.

        `done` is called with the number of examples computed so far.

        Raises:
            DataError: a state isn't finite.
        """
        computed: list[torch.Tensor] = []
        workers = workers_on(_device(self.network).type, threads)
        # Per-example gradients may have set another attention kernel, whose results differ slightly.
        with _modes_kept(self.network), attention(self.network, self._attention):
            self.network.eval()
            for states in side_by_side(self.states, examples, workers=workers, threads=threads):
                if not torch.isfinite(states).all():
                    raise DataError("an example has states in the frozen blocks that are not finite")
                computed.append(states)
                done(len(computed))
        return computed

    def _blocks(self, head: nn.Module) -> list[nn.Module]:
        """The network's blocks, and its head if the network contains it."""
        is_inside = any(module is head for module in self.network.modules())
        return [*trainable.blocks(self.network, head), head] if is_inside else trainable.blocks(self.network)

    def _calls(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of the modules that the network calls, in the order of the calls."""
        calls: list[nn.Module] = []
        handles = [
            module.register_forward_pre_hook(lambda called, _: calls.append(called)) for module in modules
        ]
        try:
            with torch.inference_mode():
                self._inputs.run(self._probe)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    @property
    def _probe(self) -> torch.Tensor:
        return self._inputs.probe(_device(self.network))

    def _check(self, model: Model) -> None:
        """Raises ConfigError if dropout is active in the prefix, or the rest needs more than its states."""
        with _modes_kept(model):
            trainable.training_mode(model)
            with global_stream(0, "dropout"):
                drawn = self.states(self._probe[0])
            model.eval()
            states = self.states(self._probe[0])
            if not torch.equal(drawn, states):
                raise ConfigError(
                    "train.cached_states: dropout works below the first tuned block of this network; expected"
                    " train.dropout = 0, or no such key"
                )
            self._inputs.expect_states(states.shape)
            ways = self._inputs.ways_to_skip(self.frozen, self._between)
            has_way = any(self._can_skip(way, states) for way in ways)
        if not has_way:
            raise ConfigError(BEYOND)

    def _can_skip(self, skipped: list[nn.Module], states: torch.Tensor) -> bool:
        """Whether the network makes the same of states as of their input, if it skips these modules."""
        self.skipped = skipped
        placed = self._inputs.place_states(states[None]).to(self._probe.device)
        with torch.inference_mode():
            whole = _tensors(self._inputs.run(self._probe))
            try:
                rest = _tensors(self._inputs.run(placed))
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return False  # It needs something else from the frozen blocks, which weren't run.
        return 0 < len(whole) == len(rest) and all(map(torch.equal, whole, rest))

    def _begin(self, network: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        """If the input is states, skip what is frozen: it returns something empty of the states' shape."""
        states = self._inputs.states_in(args, named)
        if states is None:
            return None
        self._local.states = states
        empty = torch.zeros_like(states)  # The network may write into what it is given.

        def passed(*args: Any, **kwargs: Any) -> Any:
            return empty

        for block in self.skipped:
            self._replaced.append((block, vars(block).get("forward")))
            block.forward = passed
        return self._inputs.blank(states, args, named)

    def _end(self, network: nn.Module, args: Any, output: Any) -> None:
        self._local.states = None
        for block, forward in self._replaced:
            del block.forward
            if forward is not None:
                block.forward = forward
        self._replaced.clear()

    def _enter(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Before the first tuned block: capture its input, or replace it by the states to start with."""
        if getattr(self._local, "captures", False):
            self._local.captured = args[0] if args else named["hidden_states"]
            raise _Reached
        states = getattr(self._local, "states", None)
        if states is None:
            return None
        self._local.states = None  # A network may call this block again, with later states.
        return ((states, *args[1:]), named) if args else (args, named | {"hidden_states": states})


@contextmanager
def _modes_kept(network: nn.Module) -> Iterator[None]:
    """On exit, every layer is set back to the mode, training or evaluation, that it had."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _layers_outside(network: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The network's layers without layers of their own, such as a pooling, that belong to no block."""
    inside = {module for block in blocks for module in block.modules()}
    return [m for m in network.modules() if m not in inside and not any(True for _ in m.children())]


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _is_tuned(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
