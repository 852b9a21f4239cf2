"""A network split into a frozen prefix, the blocks before the first tuned one, and the rest after it.

The prefix is computed for one sequence at a time, without padding, so a sequence's hidden states [tokens,
width] depend on its own tokens alone. If a batch has such states as its `input_ids`, the network skips the
prefix and starts with them at the first tuned block.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from atoll.backbones.checkpoint import attention, attention_of
from atoll.backbones.encoder import Model
from atoll.backbones.extract import side_by_side, workers_on
from atoll.errors import ConfigError, DataError
from atoll.learning import trainable
from atoll.protocol.random_streams import global_stream

PROBE = 8
"""The number of tokens in the sequence with which a network is tested."""


class _Reached(Exception):
    """Raised when the first tuned block is reached, to skip the rest of the network."""


class FrozenPrefix:
    """Splits one network into prefix and rest; from then on the network accepts states as well as tokens.

    Raises:
        ConfigError: the first block is tuned or none is, or the rest uses more of the prefix than its last
            block's states, or dropout is active in the prefix.
    """

    def __init__(self, model: Model) -> None:
        self.network: Any = model.backbone.model
        self._attention = attention_of(self.network)
        self._local = threading.local()
        self._replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        called = self._blocks_in_order(model.head)
        self.frozen = called[: next((n for n, block in enumerate(called) if _is_tuned(block)), len(called))]
        if not self.frozen or len(self.frozen) == len(called):
            where = "first" if not self.frozen else "no"
            raise ConfigError(
                f"train.cached_states: {where} block of this network is tuned, expected frozen blocks below"
                " tuned ones; name fewer tune.layers, or remove the key"
            )
        self.first = called[len(self.frozen)]
        self.network.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.network.register_forward_hook(self._end, always_call=True)
        self.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._check(model)

    @property
    def place(self) -> list[str]:
        """Identifies the split: the network's class, and the names of its frozen and first tuned blocks."""
        names = {id(module): name for name, module in self.network.named_modules()}
        return [type(self.network).__qualname__, *(names[id(block)] for block in [*self.frozen, self.first])]

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """The input of the first tuned block for one sequence of tokens [tokens]: float32, [tokens, width].

        The network must be in evaluation mode, as it is within `states_of_each`.
        """
        self._local.captured = None
        self._local.captures = True
        try:
            with torch.inference_mode():
                self._run(ids[None].to(_device(self.network)))
        except _Reached:
            captured: torch.Tensor = self._local.captured[0]
        finally:
            self._local.captures = False
        return captured.to("cpu", torch.float32)

    def states_of_each(
        self, sequences: Sequence[torch.Tensor], *, threads: int, done: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """The states of each sequence, float32, [tokens, width], computed by one worker per core.

        `done` is called with the number of sequences computed so far.

        Raises:
            DataError: a state isn't finite.
        """
        computed: list[torch.Tensor] = []
        workers = workers_on(_device(self.network).type, threads)
        # Per-example gradients may have set another attention kernel, whose results differ slightly.
        with _modes_kept(self.network), attention(self.network, self._attention):
            self.network.eval()
            for states in side_by_side(self.states, sequences, workers=workers, threads=threads):
                if not torch.isfinite(states).all():
                    raise DataError("an example has states in the frozen blocks that are not finite")
                computed.append(states)
                done(len(computed))
        return computed

    def _blocks_in_order(self, head: nn.Module) -> list[nn.Module]:
        """The network's blocks, and its head if the network contains it, in the order in which they run."""
        is_inside = any(module is head for module in self.network.modules())
        candidates = (
            [*trainable.blocks(self.network, head), head] if is_inside else trainable.blocks(self.network)
        )
        called: list[nn.Module] = []

        def note(block: nn.Module, inputs: Any) -> None:
            if block not in called:
                called.append(block)

        handles = [block.register_forward_pre_hook(note) for block in candidates]
        try:
            with torch.inference_mode():
                self._run(self._probe)
        finally:
            for handle in handles:
                handle.remove()
        return called

    @property
    def _probe(self) -> torch.Tensor:
        return torch.zeros((1, PROBE), dtype=torch.int64, device=_device(self.network))

    def _check(self, model: Model) -> None:
        """Raises ConfigError if dropout is active in the prefix, or the rest needs more than its states."""
        with _modes_kept(model):
            trainable.training_mode(model)
            with global_stream(0, "dropout"):
                drawn = self.states(self._probe[0])
            self.network.eval()
            states = self.states(self._probe[0])
            if not torch.equal(drawn, states):
                raise ConfigError(
                    "train.cached_states: dropout works below the first tuned block of this network; expected"
                    " train.dropout = 0, or no such key"
                )
            is_same = self._has_same_output(states[None].to(self._probe.device))
        if not is_same:
            raise ConfigError(
                "train.cached_states: the tuned blocks of this network take more than the states of the block"
                " below them; remove the key"
            )

    def _has_same_output(self, states: torch.Tensor) -> bool:
        """Whether the network has the same output for states as for the tokens they were computed from."""
        with torch.inference_mode():
            whole = self._run(self._probe)[0]
            try:
                return torch.equal(whole, self._run(states)[0])
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return False  # It needs something else from the frozen blocks, which weren't run.

    def _run(self, tokens_or_states: torch.Tensor) -> Any:
        """The network's output for unpadded sequences of tokens [n, tokens] or states [n, tokens, width]."""
        mask = torch.ones(tokens_or_states.shape[:2], dtype=torch.int64, device=tokens_or_states.device)
        takes_cache = "use_cache" in inspect.signature(self.network.forward).parameters
        return self.network(
            input_ids=tokens_or_states, attention_mask=mask, **({"use_cache": False} if takes_cache else {})
        )

    def _begin(self, network: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        """If the input is states, replace the frozen blocks by functions that return these states."""
        states = named.get("input_ids")
        if states is None or not states.is_floating_point():
            return None
        self._local.states = states

        def passed(*args: Any, **kwargs: Any) -> Any:
            return states

        for block in self.frozen:
            self._replaced.append((block, vars(block).get("forward")))
            block.forward = passed
        ids = torch.zeros(states.shape[:-1], dtype=torch.int64, device=states.device)
        return args, named | {"input_ids": ids}

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


def _is_tuned(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
