"""Flower's strategies in a job (`flwr:FedMedian`), and ours in a Flower ServerApp.

Written against Flower 1.41: its strategies keep state in attributes, draw cohorts from the
global generator and add replies up in order of arrival. Here each merge makes a fresh
instance, gives it its attributes back from the state, and hands it the updates in canonical
order, so that a Flower strategy too can be checkpointed and repeats bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from atoll.errors import ConfigError, InconsistentUpdates
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.flower_names import check_flower_name
from atoll.strategies.mean import moved
from atoll.strategies.strategy import Plan, State, Strategy

KEYS = {
    "lr": ("eta", "server_learning_rate"),
    "momentum": ("server_momentum",),
    "beta1": ("beta_1",),
    "beta2": ("beta_2",),
    "tau": ("tau",),
    "proximal_mu": ("proximal_mu",),
}
"""Keys of a job, and the names of the same arguments in Flower's constructors."""


@dataclass(frozen=True)
class FlowerStrategy:
    """One of Flower's strategies, as a pure function on tensors."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str, keys: Mapping[str, Any]) -> FlowerStrategy:
        """The Flower strategy of that class name, with a job's keys and `options`.

        Raises:
            ConfigError: there is no such strategy, or it takes no such key.
        """
        check_flower_name(name)
        accepted = _parameters(getattr(flower_strategies, name))
        options: dict[str, Any] = {}
        for key, value in keys.items():
            pairs = value.items() if key == "options" else [(key, value)]
            for k, v in pairs:
                target = next((t for t in KEYS.get(k, (k,)) if t in accepted), None)
                if target is None:
                    raise ConfigError(f"strategy.{k}: flwr:{name} does not use it")
                options[target] = v
        return cls(name, options)

    def begin(self, model: Tensors) -> State:
        return {"round": 0.0}

    def plan(self, state: State, round: int) -> Plan:
        mu = getattr(self._fresh(), "proximal_mu", 0.0)
        return {"proximal_mu": float(mu)} if mu else {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: Flower's strategy returned no model for these updates.
        """
        strategy = self._fresh()
        _restore(strategy, state)
        round = int(cast(float, state["round"])) + 1
        before = _to_record(model)
        strategy.fraction_train = 0.0  # it shall note the model that went out, not draw a cohort
        strategy.configure_train(round, before, ConfigRecord(), cast(Grid, None))
        replies = [cast(Message, _Reply.of(model, update)) for update in updates]
        arrays, _ = strategy.aggregate_train(round, replies)
        if arrays is None:
            raise InconsistentUpdates(f"flwr:{self.name} merged {len(updates)} updates into nothing")
        merged = {n: torch.from_numpy(arrays[n].numpy().copy()).to(p.dtype) for n, p in model.items()}
        return merged, {"round": float(round)} | _state(strategy, self._fresh())

    def _fresh(self) -> FlowerFedAvg:
        kind = getattr(flower_strategies, self.name)
        fixed = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
        return cast(FlowerFedAvg, kind(**fixed, **self.options))


class AtollStrategy(FlowerFedAvg):
    """One of our strategies for a ServerApp of your own: `AtollStrategy(FedOpt(adam))`.

    Replies are merged in order of node id; the cohort is still drawn by Flower's FedAvg,
    whose keyword arguments this takes.
    """

    def __init__(self, strategy: Strategy, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self._strategy = strategy
        self._model: Tensors = {}
        self._state: State | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the model that goes out, and send the plan along with it."""
        self._model = {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()}
        if self._state is None:
            self._state = self._strategy.begin(self._model)
        for key, value in self._strategy.plan(self._state, server_round).items():
            config[key.replace("_", "-")] = value
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the valid replies into the next model."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        valid.sort(key=lambda message: message.metadata.src_node_id)
        updates = [self._update(message, server_round) for message in valid]
        if self._state is None:
            raise InconsistentUpdates("replies arrived before configure_train sent a model")
        self._model, self._state = self._strategy.merge(self._model, updates, self._state)
        metrics = self.train_metrics_aggr_fn([m.content for m in valid], self.weighted_by_key)
        return _to_record(self._model), metrics

    def _update(self, message: Message, round: int) -> Update:
        arrays = message.content.array_records[self.arrayrecord_key]
        local = {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()}
        metrics = next(iter(message.content.metric_records.values()))
        return Update(
            client=str(message.metadata.src_node_id),
            round=round,
            delta={name: local[name] - p for name, p in self._model.items()},
            num_examples=int(cast(float, metrics[self.weighted_by_key])),
        )


@dataclass(frozen=True)
class _Reply:
    """The part of a Flower Message that merging reads; real messages exist only inside a Flower run."""

    content: RecordDict

    @classmethod
    def of(cls, model: Tensors, update: Update) -> _Reply:
        """The local model that an update describes, as a client's reply."""
        local = moved(model, {name: d.to(torch.float64) for name, d in update.delta.items()})
        metrics = MetricRecord({"num-examples": update.num_examples})
        return cls(RecordDict({"arrays": _to_record(local), "metrics": metrics}))

    def has_error(self) -> bool:
        return False


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _to_record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(t.detach().cpu().numpy()) for name, t in tensors.items()})


def _state(strategy: FlowerFedAvg, fresh: FlowerFedAvg) -> State:
    """The attributes in which a used strategy differs from a fresh one, as a flat dict."""
    state: State = {}
    for name, value in vars(strategy).items():
        match value:
            case dict() if value and all(isinstance(v, np.ndarray) for v in value.values()):
                for key, array in value.items():
                    state[f"{name}/{key}"] = torch.from_numpy(np.array(array))
            case list() if value and all(isinstance(v, np.ndarray) for v in value):
                for index, array in enumerate(value):
                    state[f"{name}#{index:06d}"] = torch.from_numpy(np.array(array))
            case float() | int() if value != getattr(fresh, name):
                state[name] = float(value)
    return state


def _restore(strategy: FlowerFedAvg, state: State) -> None:
    """Give a fresh strategy the attributes that `_state` took from a used one."""
    for key in sorted(state):
        value = state[key]
        if isinstance(value, torch.Tensor):
            _restore_array(strategy, key, value.numpy())
        elif key != "round":
            setattr(strategy, key, value)


def _restore_array(strategy: FlowerFedAvg, key: str, array: np.ndarray) -> None:
    """Put an array back: `name/key` goes into a dict, `name#index` into a list, in order of index."""
    name, slash, inner = key.partition("/")
    if slash:
        setattr(strategy, name, (getattr(strategy, name) or {}) | {inner: array})
        return
    name = key.partition("#")[0]
    setattr(strategy, name, [*(getattr(strategy, name) or []), array])
