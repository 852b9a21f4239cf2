"""Causal language models: any of transformers' (Llama, GPT-2, Qwen, …)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from atoll.backbones.checkpoint import load_transformer
from atoll.backbones.encoder import TARGETS, Batch, Encoder, Model
from atoll.backbones.resolve import Backbone
from atoll.backbones.text import load_tokenizer
from atoll.errors import WeightsError
from atoll.job.job import Job
from atoll.tasks.language_modeling.generation import Decoding, written_on
from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.language_modeling.packing import check_packs, packed
from atoll.tasks.language_modeling.template import Tokens
from atoll.tasks.losses import cross_entropies

KIND = "AutoModelForCausalLM"
_STEP = 8
"""Batches are padded to a multiple of this many tokens."""


def prepared(tokens: Tokens) -> Batch:
    """An example as an element of a shard's inputs: `input_ids` [tokens] and `places` [learnt].

    A place is the index of the token before a learnt one, at which the learnt one is predicted.
    """
    places = [place - 1 for place, is_learnt in enumerate(tokens.learnt) if is_learnt]
    return {
        "input_ids": torch.tensor(tokens.ids, dtype=torch.int64),
        "places": torch.tensor(places, dtype=torch.int64),
    }


class CausalEncoder(Encoder):
    """Collates examples with padding on the right, which only the mask marks, not a token id."""

    reads_tokens = True

    def __init__(self, model: nn.Module, tokenizer: Any, most: int) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        self._tokenizer: Any = tokenizer
        self._most = most

    @property
    def tokenizer(self) -> Any:
        """The network's tokenizer."""
        return self._tokenizer

    def preprocess(self, inputs: Sequence[Batch]) -> Sequence[Batch]:
        return inputs

    def collate(self, ready: Sequence[Batch]) -> Batch:
        """`input_ids` and `attention_mask` [batch, tokens]; `places` [batch, learnt], padded with 0."""
        ids = _table([one["input_ids"] for one in ready], None)
        places = _table([one["places"] for one in ready], self._most)
        lengths = torch.tensor([len(one["input_ids"]) for one in ready])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "places": places}


def _table(rows: Sequence[torch.Tensor], most: int | None) -> torch.Tensor:
    """Rows as a table, padded with zeros to a multiple of `_STEP`, or to `most` if that is less."""
    length = max(1, *(len(row) for row in rows))
    length = -(-length // _STEP) * _STEP
    table = torch.zeros((len(rows), length if most is None else min(length, most)), dtype=torch.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


class CausalModel(Model):
    """Predicts the negative log-probability of each learnt token given the tokens before it."""

    encoder_kind: ClassVar[type[CausalEncoder]] = CausalEncoder

    def __init__(self, backbone: CausalEncoder, head: nn.Module, job: Job, options: LanguageOptions) -> None:
        super().__init__(backbone, head, frozenset(name for name, _ in head.named_parameters()))
        self.tunes_head = job.tune.method == "head"
        self._options, self._seed = options, job.seed

    def forward(self, batch: Batch) -> torch.Tensor:
        """-log p of each target, [batch, learnt]; values at places without a target are meaningless."""
        return surprises(self.scores(batch), batch)

    def measure(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(-log p and whether the target is the most likely token, [batch, learnt, 2]; -log p alone)."""
        scores = self.scores(batch)
        surprise = surprises(scores, batch)
        hit = scores.argmax(2) == _targets(batch)
        return torch.stack([surprise, hit.to(surprise.dtype)], 2), surprise

    def predict(self, batch: Batch) -> Any:
        """As the first of `measure` if the batch has targets; else the texts that the model generates."""
        if TARGETS in batch:
            return self.measure(batch)[0]
        return self.written(batch)

    def written(self, batch: Batch) -> list[str]:
        """The text that the model generates after each prompt of the batch."""
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [self._written(ids[mask.bool()]) for ids, mask in rows]

    def scores(self, batch: Batch) -> torch.Tensor:
        """Logits [batch, learnt, vocabulary]; others aren't computed, which saves most of the work."""
        network: Any = self.backbone.model
        shared = packed(batch) if self._options.packing else None
        if shared is not None:
            with _only(network.get_output_embeddings(), partial(_of_all_rows, shared.pop("places"))):
                scores: torch.Tensor = network(**shared, use_cache=False).logits
            return scores.float()
        with _only(network.get_output_embeddings(), partial(_of_each_row, batch["places"])):
            scores = network(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
        return scores.float()

    def _written(self, prompt: torch.Tensor) -> str:
        """The text generated after a single prompt, so that it doesn't depend on others in a batch."""
        assistant = self.backbone
        assert isinstance(assistant, CausalEncoder)
        how = Decoding(self._options.max_new_tokens, self._options.temperature)
        return written_on(assistant.model, assistant.tokenizer, prompt, how, self._seed)


def _targets(batch: Batch) -> torch.Tensor:
    return batch[TARGETS][:, : batch["places"].shape[1]]


def surprises(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of each target, [batch, learnt], from logits [batch, learnt, vocabulary]."""
    known = _targets(batch).clamp(0, scores.shape[2] - 1)
    return cross_entropies(scores, known)


def _of_each_row(places: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The states [batch, learnt, width] at places [batch, learnt], indices within each row."""
    return states.gather(1, places.unsqueeze(2).expand(-1, -1, states.shape[2]))


def _of_all_rows(places: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The states [batch, learnt, width] at places [batch, learnt], indices into all rows joined together."""
    return states.flatten(0, 1)[places]


@contextmanager
def _only(head: nn.Module, chosen_of: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the output layer `head` gets only the states that `chosen_of` selects from its input."""

    def chosen(module: nn.Module, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return chosen_of(states[0])

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def causal_tokenizer(backbone: Backbone) -> Any:
    """The tokenizer of a causal network; it needs no padding token.

    Raises:
        WeightsError: the network isn't from transformers, or its tokenizer can't map tokens to characters.
    """
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(
            f"backbone.name: {backbone.kind}:{backbone.name} foretells no text, expected"
            " hf:SmolLM2-135M-Instruct, another hf:NAME, or a folder of a causal model"
        )
    tokenizer = load_tokenizer(backbone.folder)
    if not tokenizer.is_fast:
        raise WeightsError(f"{backbone.folder}: its tokenizer is a slow one, expected a tokenizer.json")
    return tokenizer


def _tunes_head(job: Job) -> bool:
    """Whether the output layer is trained while other parts of the network are frozen."""
    keeps = "trained" if job.personal.keep == "head" else "frozen"
    return job.tune.method == "head" or (job.tune.method == "lora" and (job.tune.head or keeps) != "frozen")


def load_causal(
    backbone: Backbone,
    job: Job,
    tokenizer: Any,
    options: LanguageOptions,
    kind: type[CausalModel] = CausalModel,
) -> CausalModel:
    """The network with its resolved weights, as a model of class `kind`; its head is its output layer.

    Raises:
        WeightsError: the network isn't a causal model, or its weights don't fit.
        ConfigError: `packing` is set, and in this network packed examples influence each other.
    """
    network = load_transformer(backbone, job.seed, KIND)
    if options.packing:
        check_packs(network)
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise WeightsError(f"{backbone.folder}: a network without an output layer, expected a linear one")
    # The padding token is often also the one that ends a turn, so its embedding must be trained.
    network.get_input_embeddings().padding_idx = None
    if _tunes_head(job):
        # As long as it shares its weights with the embeddings, tuning it would change them too.
        head.weight = nn.Parameter(head.weight.detach().clone())
    return kind(kind.encoder_kind(network, tokenizer, options.max_tokens), head, job, options)
