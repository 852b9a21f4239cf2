"""Language modelling: predicts the next token of texts, completions, or an assistant's turns.

Loss: cross-entropy of the next token, the mean over all learnt tokens of a batch (as in transformers).
Learnt tokens are those that are trained on, without prompts and users' turns. Under example-level privacy the
loss is the mean over each example's tokens, then over examples, so that an example's term doesn't depend on
the others' lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from atoll.backbones.encoder import Batch, Model
from atoll.backbones.options import options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.schema import Schema
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.errors import ConfigError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.language_modeling.causal import CausalModel, causal_tokenizer, load_causal, prepared
from atoll.tasks.language_modeling.data import ASSISTANT, CONVERSATIONS, Messages, form_of
from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.language_modeling.template import Coder, Rendered, Template, Tokens, joined, whole
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.task import Sample

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

IGNORE_INDEX = -100
"""The target at padding after the last learnt token."""

_SOURCES = {"question": "prompt", "answer": "completion"}
"""This task's names for the columns of built-in question sets."""


@dataclass(frozen=True)
class LanguageModeling(SchemaTask):
    """Language modelling; targets are [n, max_tokens + 1]: the learnt tokens, last their text's bytes."""

    info_fields = ()

    options_kind: ClassVar[type[LanguageOptions]] = LanguageOptions
    model_kind: ClassVar[type[CausalModel]] = CausalModel
    schema: ClassVar[Schema] = CONVERSATIONS

    name: str = "language-modeling"
    summary: str = (
        "the next token of texts, answers, chats; Llama, GPT-2, Qwen, …; perplexity by token and byte"
    )
    uses_pooled_features: bool = False
    sees_targets: bool = True
    primary_metric: str = "byte_perplexity"
    options: LanguageOptions = field(default_factory=LanguageOptions)
    backbone: Backbone | None = None
    examples_count_alike: bool = False

    def configured(self, job: Job, backbone: Backbone) -> Self:
        return replace(
            self,
            options=options_of(job.task.options, self.options_kind),
            backbone=backbone,
            examples_count_alike="example" in job.privacy.units,
        )

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.backbone is not None, "a shard is asked of the task that is bound to a job"
        return causal_tokenizer(self.backbone)

    @cached_property
    def template(self) -> Template | None:
        """The chat template: the job's, or the tokenizer's; None if there is none, or the job's is empty."""
        source = self.options.template
        if source is None and self._tokenizer.chat_template is not None:
            source = self._tokenizer.get_chat_template()
        return Template(self._tokenizer, source) if source else None

    @cached_property
    def coder(self) -> Coder:
        """The conversion of texts to tokens of this backbone, at most `max_tokens` of them."""
        return Coder(self._tokenizer, self.options.max_tokens)

    def check(self, job: Job) -> None:
        if options_of(job.task.options, self.options_kind).packing:
            _check_packing(job)
        self.schema.check(job.data)
        refuse_augment(job)
        if job.backbone.is_given("max_tokens"):
            raise ConfigError(
                f"backbone.max_tokens: {self.name} has task.options.max_tokens instead, expected no such key"
            )

    def records(self, options: Options) -> Schema:
        return self.schema

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        """Questions become prompts, and answers completions."""
        renamed = {
            split: table.rename_columns([_SOURCES.get(name, name) for name in table.column_names])
            for split, table in splits.items()
        }
        return super().from_builtin(renamed, job)

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        bound = self.of_options(options, backbone)
        table = self.read(source, data, options)
        tokens = [one for part in (table.train, table.test) if part is not None for one in bound.tokens(part)]
        cut = sum(one.is_cut for one in tokens)
        silent = sum(not any(one.learnt) for one in tokens)
        most = f"task.options.max_tokens = {bound.options.max_tokens}"
        return (
            f"{sum(len(one.ids) for one in tokens)} tokens,"
            f" of which {sum(sum(one.learnt) for one in tokens)} are learnt",
            f"{cut} of {len(tokens)} examples are longer than {most} and are cut;"
            f" of {silent} nothing is learnt",
            *bound.left_out(table),
        )

    def left_out(self, table: Table) -> Sequence[str]:
        """A line about messages that the template doesn't write, such as those of an unknown role, if any."""
        if self.template is None or "messages" not in table.train.column_names:
            return ()
        parts = [part for part in (table.train, table.test) if part is not None]
        rows = [messages for part in parts for messages in part.cells("messages")]
        of_row = [self.template.left_out(row, f"conversation {n}") for n, row in enumerate(rows, start=1)]
        if not (roles := sorted(set().union(*of_row))):
            return ()
        return (
            f"{sum(map(bool, of_row))} of {len(rows)} conversations have messages that the chat template"
            f" does not write, those of {', '.join(roles)}: nothing of them is seen",
        )

    def of_options(self, options: Options, backbone: Backbone) -> Self:
        """This task with a job's `task.options` and its backbone."""
        return replace(self, options=options_of(options, self.options_kind), backbone=backbone)

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        return {}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {}

    def required_info(self) -> DataInfo:
        """The hashes of the tokenizer and the chat template, which turn texts into tokens."""
        coded = self._tokenizer.backend_tokenizer.to_str()
        template = {} if self.template is None else {"template": self.template.sha256}
        return {"tokenizer": hashlib.sha256(coded.encode()).hexdigest(), **template}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        return self.shard_of(self.tokens(dataset), keys)

    def shard_of(self, examples: Sequence[Tokens], keys: Sequence[bytes]) -> Shard:
        """A shard of texts that are tokens already, each with its key, in the keys' canonical order."""
        order = canonical_order(keys)
        inputs = tuple(prepared(examples[place]) for place in order)
        targets = self.targets([examples[place] for place in order])
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def tokens(self, dataset: Dataset) -> list[Tokens]:
        """Every row as tokens, in the order of the rows.

        Raises:
            ConfigError: the rows are conversations, and there is no chat template.
            DataError: the template refuses one of them.
        """
        return [self.coder.tokens(rendered) for rendered in self.rendered(dataset)]

    def rendered(self, dataset: Dataset) -> list[Rendered]:
        """Every row as text with the spans to learn, in the order of the rows; raises as `tokens` does."""
        form = form_of(dataset)
        rows = list(zip(*(dataset[name][:] for name in form), strict=True))
        if form == ("text",):
            return [whole(text) for (text,) in rows]
        if form == ("messages",):
            return [self.conversation(row[0], f"conversation {n}") for n, row in enumerate(rows, start=1)]
        if self.template is None:
            return [joined(prompt, completion) for prompt, completion in rows]
        return [
            self.conversation([*user_message(prompt), {"role": ASSISTANT, "content": answer}], f"prompt {n}")
            for n, (prompt, answer) in enumerate(rows, start=1)
        ]

    def conversation(self, messages: Messages, where: str) -> Rendered:
        """A conversation as the chat template writes it; raises as `tokens` does."""
        if self.template is None:
            raise ConfigError(
                "task.options.template: the data holds messages, and the tokenizer of this backbone has no"
                " chat template; expected one (jinja)"
            )
        return self.template.conversation(messages, where)

    def targets(self, examples: Sequence[Tokens]) -> torch.Tensor:
        """The targets [n, max_tokens + 1]: each example's learnt tokens, last their text's size in bytes."""
        table = torch.full((len(examples), self.options.max_tokens + 1), IGNORE_INDEX)
        for row, one in zip(table, examples, strict=True):
            learnt = [token for token, is_learnt in zip(one.ids, one.learnt, strict=True) if is_learnt]
            row[: len(learnt)] = torch.tensor(learnt, dtype=torch.int64)
            row[-1] = one.learnt_bytes
        return table

    def input_suffixes(self) -> tuple[str, ...]:
        return (".txt",)

    def parse_input(self, text: str) -> Batch:
        """A prompt, from a text or file, as tokens; with a chat template, as a user's message.

        Raises:
            DataError: the prompt can't be read, is empty, or the template refuses it.
        """
        ids = self.prompt_tokens(read_text_input(text), "the prompt")
        return prepared(Tokens(tuple(ids), (False,) * len(ids), 0))

    def prompt_tokens(self, text: str, where: str) -> list[int]:
        """The tokens of a prompt, up to where the answer begins; raises as `parse_input`."""
        if self.template is not None:
            return self.tokens_of(self.template.question(user_message(text), where))
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def tokens_of(self, rendered: str) -> list[int]:
        """The tokens of a text that the template wrote, which contains all special tokens already."""
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        options = options_of(job.task.options, self.options_kind)
        return load_causal(backbone, job, causal_tokenizer(backbone), options, self.model_kind)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        real = has_target(outputs, targets)
        if self.examples_count_alike:
            return ((outputs * real).sum(1) / real.sum(1).clamp_min(1)).mean()
        return (outputs * real).sum() / real.sum().clamp_min(1)

    def loss_weight(self, shard: Shard, rows: Sequence[int]) -> float:
        return len(rows) if self.examples_count_alike else self.num_with_target(shard.targets_of(rows))

    def eval_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of an example's token losses, the mean over examples; evaluation divides it by tokens."""
        return (outputs * has_target(outputs, targets)).sum() / len(targets)

    def num_with_target(self, targets: torch.Tensor) -> int:
        return int((targets[:, :-1] >= 0).sum())

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import Metric, MetricCollection

        from atoll.tasks.language_modeling.metrics import (
            BitsPerByte,
            BytePerplexity,
            Perplexity,
            TokenAccuracy,
        )

        metrics: dict[str, Metric | MetricCollection] = {
            "byte_perplexity": BytePerplexity(),
            "bits_per_byte": BitsPerByte(),
            "perplexity": Perplexity(),
            "token_accuracy": TokenAccuracy(),
        }
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(-log p, whether the target is the most likely token, whether there is a target; bytes).

        The first three are [n, learnt], the last is [n], the size of each example's learnt text.
        """
        sums = predictions.cpu()
        return sums[:, :, 0], sums[:, :, 1], has_target(sums, targets), targets[:, -1]

    def samples(self, model: Model, shard: Shard) -> list[Sample]:
        assert isinstance(model, CausalModel)
        device = next(model.parameters()).device
        all_samples: list[Sample] = []
        for held in shard.inputs:
            if len(all_samples) == self.options.samples:
                break
            prompt, reference = self.asked_and_said(held)
            if len(prompt) > 1:
                asks = prompt[None].to(device)
                (written,) = model.written({"input_ids": asks, "attention_mask": torch.ones_like(asks)})
                all_samples.append(Sample(self._decoded(prompt), written, reference))
        return all_samples

    def asked_and_said(self, held: Batch) -> tuple[torch.Tensor, str]:
        """(the tokens before the first learnt span, the text of that span)."""
        places = held["places"]
        if not len(places):
            return places, ""
        ends = (places.diff() != 1).nonzero().flatten()
        learnt = places[: int(ends[0]) + 1] if len(ends) else places
        return held["input_ids"][: int(places[0]) + 1], self._decoded(held["input_ids"][learnt + 1])

    def _decoded(self, ids: torch.Tensor) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        return [{"label": text} for text in predictions]


def _check_packing(job: Job) -> None:
    """Raises ConfigError if the job needs a separate row for each example."""
    if "example" in job.privacy.units:
        raise ConfigError(
            "task.options.packing: under example-level privacy each example's own gradient is clipped, which"
            " one row for several doesn't have; expected false"
        )
    if job.train.cached_states is not None:
        raise ConfigError(
            "task.options.packing: train.cached_states keeps the states of each example in a row of its own;"
            " expected false, or no train.cached_states"
        )


def user_message(prompt: str) -> Messages:
    """A prompt as a user's message."""
    return [{"role": "user", "content": prompt}]


def has_target(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether each position of the outputs has a target, [n, learnt]."""
    return targets[:, : outputs.shape[1]] >= 0


LANGUAGE_MODELING = LanguageModeling()
