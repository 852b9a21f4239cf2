"""Networks that foretell the next token: any of transformers' causal models (Llama, GPT-2, Qwen, …)."""

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
"""Batches are as long as a multiple of this."""


def prepared(tokens: Tokens) -> Batch:
    """An example as shards hold it: its tokens, and the places from which the learnt ones are foretold."""
    places = [place - 1 for place, is_learnt in enumerate(tokens.learnt) if is_learnt]
    return {
        "input_ids": torch.tensor(tokens.ids, dtype=torch.int64),
        "places": torch.tensor(places, dtype=torch.int64),
    }


class CausalEncoder(Encoder):
    """Tokens on the left, and nothing on the right: a mask says what is real, never the padding's id."""

    reads_tokens = True

    def __init__(self, model: nn.Module, tokenizer: Any, most: int) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        self._tokenizer: Any = tokenizer
        self._most = most

    @property
    def tokenizer(self) -> Any:
        """The one that belongs to the network."""
        return self._tokenizer

    def preprocess(self, inputs: Sequence[Batch]) -> Sequence[Batch]:
        return inputs

    def collate(self, ready: Sequence[Batch]) -> Batch:
        """`input_ids` and `attention_mask` [batch, tokens]; `places` [batch, learnt], 0 behind the last."""
        ids = _table([one["input_ids"] for one in ready], None)
        places = _table([one["places"] for one in ready], self._most)
        lengths = torch.tensor([len(one["input_ids"]) for one in ready])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "places": places}


def _table(rows: Sequence[torch.Tensor], most: int | None) -> torch.Tensor:
    """Rows of numbers, filled up with zeros to a multiple of `_STEP` that is at most `most`."""
    length = max(1, *(len(row) for row in rows))
    length = -(-length // _STEP) * _STEP
    table = torch.zeros((len(rows), length if most is None else min(length, most)), dtype=torch.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


class CausalModel(Model):
    """The surprise of each learnt token, given all before it."""

    encoder_kind: ClassVar[type[CausalEncoder]] = CausalEncoder

    def __init__(self, backbone: CausalEncoder, head: nn.Module, job: Job, options: LanguageOptions) -> None:
        super().__init__(backbone, head, frozenset(name for name, _ in head.named_parameters()))
        self.tunes_head = job.tune.method == "head"
        self._options, self._seed = options, job.seed

    def forward(self, batch: Batch) -> torch.Tensor:
        """-log of the probability of each target, [batch, learnt]; of a place without one it says nothing."""
        return surprises(self.scores(batch), batch)

    def measure(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(surprise and whether the likeliest token is the target, [batch, learnt, 2]; the surprise)."""
        scores = self.scores(batch)
        surprise = surprises(scores, batch)
        hit = scores.argmax(2) == _targets(batch)
        return torch.stack([surprise, hit.to(surprise.dtype)], 2), surprise

    def predict(self, batch: Batch) -> Any:
        """What is measured, where targets are there; else what the model writes on, a text each."""
        if TARGETS in batch:
            return self.measure(batch)[0]
        return self.written(batch)

    def written(self, batch: Batch) -> list[str]:
        """What the model writes on, a text for each prompt."""
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [self._written(ids[mask.bool()]) for ids, mask in rows]

    def scores(self, batch: Batch) -> torch.Tensor:
        """[batch, learnt, vocabulary]: what is not learnt isn't scored, which is most of the work."""
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
        """The text that follows; each prompt on its own, so that none depends on its neighbours."""
        assistant = self.backbone
        assert isinstance(assistant, CausalEncoder)
        how = Decoding(self._options.max_new_tokens, self._options.temperature)
        return written_on(assistant.model, assistant.tokenizer, prompt, how, self._seed)


def _targets(batch: Batch) -> torch.Tensor:
    return batch[TARGETS][:, : batch["places"].shape[1]]


def surprises(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log of the probability of each target, [batch, learnt], from all scores."""
    known = _targets(batch).clamp(0, scores.shape[2] - 1)
    return cross_entropies(scores, known)


def _of_each_row(places: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The states [batch, learnt, width] at places [batch, learnt] of each row."""
    return states.gather(1, places.unsqueeze(2).expand(-1, -1, states.shape[2]))


def _of_all_rows(places: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The states [batch, learnt, width] at places that count through all rows."""
    return states.flatten(0, 1)[places]


@contextmanager
def _only(head: nn.Module, chosen_of: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the output layer sees the chosen states alone."""

    def chosen(module: nn.Module, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return chosen_of(states[0])

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def causal_tokenizer(backbone: Backbone) -> Any:
    """The tokenizer that belongs to a causal network; one without a padding token will do.

    Raises:
        WeightsError: the network isn't transformers', or the tokenizer can't tell which letters a token has.
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
    """Whether the output layer is trained, and all of the network isn't."""
    keeps = "trained" if job.personal.keep == "head" else "frozen"
    return job.tune.method == "head" or (job.tune.method == "lora" and (job.tune.head or keeps) != "frozen")


def load_causal(
    backbone: Backbone,
    job: Job,
    tokenizer: Any,
    options: LanguageOptions,
    kind: type[CausalModel] = CausalModel,
) -> CausalModel:
    """Build the network with its resolved weights; its head is its output layer.

    Raises:
        WeightsError: it isn't a causal model, or its weights don't fit.
        ConfigError: `packing` is asked of a network in which examples of one row see each other.
    """
    network = load_transformer(backbone, job.seed, KIND)
    if options.packing:
        check_packs(network)
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise WeightsError(f"{backbone.folder}: a network without an output layer, expected a linear one")
    # The token that fills up is often one that ends a turn, and its row must learn as any other.
    network.get_input_embeddings().padding_idx = None
    if _tunes_head(job):
        # While it is tied to the embeddings, to tune the one would change the other.
        head.weight = nn.Parameter(head.weight.detach().clone())
    return kind(kind.encoder_kind(network, tokenizer, options.max_tokens), head, job, options)
