"""Preference learning by direct preference optimisation (DPO): prefers chosen to rejected completions.

Loss (Rafailov et al. 2023, equation 7): -log sigmoid of the margin of rewards, the mean over pairs. A
completion's reward is beta times its log-probability minus that under the reference model, which is the model
before the first round. A pair whose prompt leaves no room for a completion adds nothing to the loss and isn't
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from atoll.backbones.encoder import Batch
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.schema import Schema
from atoll.data.shard import Shard, canonical_order
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.language_modeling.data import ASSISTANT, Messages
from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.language_modeling.task import LanguageModeling, user_message
from atoll.tasks.language_modeling.template import Rendered, Tokens, joined, whole
from atoll.tasks.preference.data import PREFERENCES
from atoll.tasks.preference.model import PairModel, prepared_pair

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

Pair = tuple[Tokens, Tokens]
"""(the chosen, the rejected) completion, each as tokens with its prompt."""


class PreferenceOptions(LanguageOptions):
    """Options of language modelling, and `beta`: the higher, the closer the model stays to the reference."""

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1


@dataclass(frozen=True)
class Preference(LanguageModeling):
    """Preference learning; targets are [n]: 1 if both completions have a token to score, else 0."""

    info_fields = ()

    options_kind: ClassVar[type[LanguageOptions]] = PreferenceOptions
    model_kind = PairModel
    schema: ClassVar[Schema] = PREFERENCES

    name: str = "preference"
    summary: str = "the better of two completions, by DPO; Llama, GPT-2, Qwen, …; accuracy, reward margin"
    sees_targets: bool = False
    primary_metric: str = "accuracy"
    options: PreferenceOptions = field(default_factory=PreferenceOptions)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return self.schema.adopted(splits)

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        bound, table = self.of_options(options, backbone), self.read(source, data, options)
        pairs = [pair for part in (table.train, table.test) if part is not None for pair in bound.pairs(part)]
        cut = sum(any(side.is_cut for side in pair) for pair in pairs)
        most = f"task.options.max_tokens = {bound.options.max_tokens}"
        return (
            f"{sum(len(side.ids) for pair in pairs for side in pair)} tokens,"
            f" of which {sum(sum(side.learnt) for pair in pairs for side in pair)} are learnt",
            f"{cut} of {len(pairs)} pairs are longer than {most} and are cut;"
            f" of {sum(not _says_something(pair) for pair in pairs)} nothing is learnt",
        )

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order, pairs = canonical_order(keys), self.pairs(dataset)
        inputs = tuple(prepared_pair(*pairs[place]) for place in order)
        targets = torch.tensor([int(_says_something(pairs[place])) for place in order], dtype=torch.int64)
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def pairs(self, dataset: Dataset) -> list[Pair]:
        """Every row as a pair, in the order of the rows; raises as `tokens` does."""
        prompts = dataset["prompt"][:] if "prompt" in dataset.column_names else [None] * len(dataset)
        rows = zip(prompts, dataset["chosen"][:], dataset["rejected"][:], strict=True)
        return [self._pair(*row, f"pair {number}") for number, row in enumerate(rows, start=1)]

    def _pair(self, prompt: Any, chosen: Any, rejected: Any, where: str) -> Pair:
        if isinstance(chosen, str):
            sides = [self._completed(prompt, answer, where) for answer in (chosen, rejected)]
        else:
            before, shared = prompt or [], _shared(chosen, rejected)
            sides = [
                self._answered([*before, *answer[:shared]], answer[shared:], where)
                for answer in (chosen, rejected)
            ]
        first, second = (self.coder.tokens(side) for side in sides)
        return first, second

    def _completed(self, prompt: str | None, answer: str, where: str) -> Rendered:
        if prompt is None:
            return whole(answer)
        if self.template is None:
            return joined(prompt, answer)
        return self._answered(user_message(prompt), [{"role": ASSISTANT, "content": answer}], where)

    def _answered(self, before: Messages, messages: Messages, where: str) -> Rendered:
        """A conversation in which only the assistant's turns after `before` are trained on."""
        rendered = self.conversation([*before, *messages], where)
        known = sum(message["role"] == ASSISTANT for message in before)
        return Rendered(rendered.text, rendered.learnt[known:], rendered.is_templated)

    def asked_and_said(self, held: Batch) -> tuple[torch.Tensor, str]:
        return super().asked_and_said({name: held[f"chosen.{name}"] for name in ("input_ids", "places")})

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        margin = self.options.beta * (outputs[:, 0] - outputs[:, 1])
        return -(nn.functional.logsigmoid(margin) * targets).sum() / len(targets)

    def loss_weight(self, shard: Shard, rows: Sequence[int]) -> float:
        return len(rows)

    def eval_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs, targets)

    def num_with_target(self, targets: torch.Tensor) -> int:
        return int(targets.sum())

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import Metric, MetricCollection

        from atoll.tasks.preference.metrics import PreferenceAccuracy, RewardMargin

        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": PreferenceAccuracy(),
            "reward_margin": RewardMargin(),
        }
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(rewards [n, 2], targets [n])."""
        return self.options.beta * predictions.cpu(), targets


def _shared(chosen: Messages, rejected: Messages) -> int:
    """The number of leading messages that are equal in both, without the last message of either."""
    most = min(len(chosen), len(rejected)) - 1
    return next((place for place in range(most) if chosen[place] != rejected[place]), most)


def _says_something(pair: Pair) -> bool:
    return all(any(side.learnt) for side in pair)


PREFERENCE = Preference()
