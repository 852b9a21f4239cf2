"""Causal models for multiple choice: the likelihood of each choice, and the choice that the model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atoll.backbones.encoder import TARGETS, Batch
from atoll.tasks.language_modeling.causal import CausalEncoder, CausalModel, prepared
from atoll.tasks.language_modeling.template import Tokens
from atoll.tasks.multiple_choice.options import ChoiceOptions
from atoll.tasks.multiple_choice.parsing import parsed

_PROMPT, _ORDER, _FITS = "prompt", "order", "fits"
_WANTED, _SCORED, _TEXT = "wanted", "scored", "text"
_SIDES = ("input_ids", "places", _WANTED, _SCORED, _TEXT)
"""The tensors of each choice."""


@dataclass(frozen=True)
class Choice:
    """A choice as tokens after its question; `scored` marks the tokens of its text, without end tokens."""

    text: str
    tokens: Tokens
    scored: tuple[bool, ...]


def prepared_question(
    prompt: Sequence[int], choices: Sequence[Choice], order: Sequence[int], *, fits: bool
) -> Batch:
    """A question as an element of a shard's inputs: the prompt's tokens, and choices, the right one first.

    `order` has each choice's index in the data. A question that doesn't fit isn't asked.
    """
    held = {
        _PROMPT: torch.tensor(list(prompt), dtype=torch.int64),
        _ORDER: torch.tensor(list(order), dtype=torch.int64),
        _FITS: torch.tensor([fits]),
    }
    for number, choice in enumerate(choices):
        held |= {f"{number}.{name}": tensor for name, tensor in _side(choice).items()}
    return held


def _side(choice: Choice) -> Batch:
    """A choice as tensors of a shard."""
    tensors = prepared(choice.tokens)
    places = tensors["places"] + 1
    return tensors | {
        _WANTED: tensors["input_ids"][places],
        _SCORED: torch.tensor(choice.scored, dtype=torch.int64)[places],
        _TEXT: torch.tensor(list(choice.text.encode()), dtype=torch.int64),
    }


class ChoiceEncoder(CausalEncoder):
    """Collates questions with different numbers of choices into one batch."""

    def collate(self, ready: Sequence[Batch]) -> Batch:
        """A batch of questions, padded with zeros.

        For each choice `input_ids` and `attention_mask` [batch, choices, tokens]; `places`, `wanted` and
        `scored` [batch, choices, learnt]; `text` [batch, choices, bytes]. For each question `prompt` [batch,
        tokens], with 1 added to each token, `order` [batch, choices] and `fits` [batch, 1].
        """
        most = max(1, *(len(one[_ORDER]) for one in ready))
        nothing = torch.zeros(0, dtype=torch.int64)
        sides = [
            {name: one.get(f"{number}.{name}", nothing) for name in _SIDES}
            for one in ready
            for number in range(most)
        ]
        batch = super().collate(sides)
        learnt = batch["places"].shape[1]
        batch |= {name: _filled([side[name] for side in sides], learnt) for name in (_WANTED, _SCORED)}
        batch[_TEXT] = _filled([side[_TEXT] for side in sides])
        batch = {name: t.view(len(ready), most, -1) for name, t in batch.items()}
        batch[_PROMPT] = _filled([one[_PROMPT] + 1 for one in ready])
        batch[_ORDER] = _filled([one[_ORDER] for one in ready], most)
        batch[_FITS] = torch.stack([one[_FITS] for one in ready])
        return batch


def _filled(rows: Sequence[torch.Tensor], length: int | None = None) -> torch.Tensor:
    """Rows as a table of this length (by default the longest row's), padded with zeros."""
    length = max(1, *(len(row) for row in rows)) if length is None else length
    table = torch.zeros((len(rows), length), dtype=torch.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row[:length]
    return table


class ChoiceModel(CausalModel):
    """Trains on the negative log-likelihood of the right choice's tokens, and evaluates all choices."""

    encoder_kind = ChoiceEncoder
    _options: ChoiceOptions

    def forward(self, batch: Batch) -> torch.Tensor:
        """-log of the probability of each token of the right choice, [batch, learnt]."""
        return super().forward(_of_choice(batch, 0) | {TARGETS: batch[TARGETS]})

    def measure(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        """(each question's answer as in `predict`, -log p of the right choice's tokens [batch, learnt])."""
        return self._answers(batch)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """The answer to each question.

        `likelihood` [choices] is the log-probability of each choice's text, `order` the choices' indices in
        the data, and `texts` their texts. `written` is the text that the model writes, `said` the index of
        the choice that it means (-1 for none). A question without choices has `written` alone; one that
        doesn't fit has an empty `written`.
        """
        return self._answers(batch)[0]

    def _answers(self, batch: Batch) -> tuple[list[dict[str, Any]], torch.Tensor]:
        likelihood, surprise = self._likelihood(batch)
        answers = []
        for row, texts in enumerate(_texts(batch)):
            answer: dict[str, Any] = {"texts": texts, "fits": bool(batch[_FITS][row])}
            if texts:
                answer["likelihood"] = likelihood[row, : len(texts)].cpu()
                answer["order"] = batch[_ORDER][row, : len(texts)].tolist()
            if self._options.generated or not texts:
                answer |= self._written_answer(batch[_PROMPT][row], answer)
            answers.append(answer)
        return answers, surprise

    def _likelihood(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p of each choice's text, float64, [batch, choices]; -log p of the first choice's tokens)."""
        count, most = batch[_ORDER].shape
        surprise = torch.zeros(batch["places"].shape, device=batch["places"].device)
        for number in range(most):
            choice = _of_choice(batch, number)
            rows = choice["attention_mask"].any(1)
            if rows.any():
                choice = {name: t[rows] for name, t in choice.items()}
                surprise[rows, number] = super().forward(choice)
        scored = surprise.to(torch.float64) * batch[_SCORED]
        return -scored.sum(2).view(count, most), surprise[:, 0]

    def _written_answer(self, prompt: torch.Tensor, answer: dict[str, Any]) -> dict[str, Any]:
        """The text that the model writes, and the index in the batch of the choice that it means."""
        if not answer["fits"]:
            return {"written": "", "said": -1}
        written = self._written(prompt[prompt > 0] - 1)
        if not answer["texts"]:
            return {"written": written}
        in_order = dict(zip(answer["order"], answer["texts"], strict=True))
        place = parsed(written, [in_order[n] for n in sorted(in_order)], by_letter=self._options.listed)
        return {"written": written, "said": -1 if place is None else answer["order"].index(place)}


def _of_choice(batch: Batch, number: int) -> Batch:
    """Choice `number` of every question as a batch of the language model, with its tokens as targets."""
    tensors = {name: batch[name][:, number] for name in ("input_ids", "attention_mask", "places")}
    return tensors | {TARGETS: batch[_WANTED][:, number]}


def _texts(batch: Batch) -> Iterator[list[str]]:
    """The texts of each question's choices."""
    for rows in batch[_TEXT].tolist():
        texts = [bytes(byte for byte in row if byte).decode() for row in rows]
        yield [text for text in texts if text]
