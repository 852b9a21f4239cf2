"""Chatting with a trained causal model, within the length of its context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atoll.errors import DataError
from atoll.tasks.language_modeling.data import Messages, turns_cell
from atoll.tasks.language_modeling.generation import Decoding, written_on
from atoll.tasks.language_modeling.task import LanguageModeling

logger = logging.getLogger(__name__)

SYSTEM, USER = "system", "user"


@dataclass(frozen=True)
class Answer:
    """The model's text, and the messages that it has read, without the oldest ones if not all fit."""

    text: str
    seen: Messages


@dataclass(frozen=True)
class Chat:
    """A causal network with its task's chat template; `seed` is the job's, for sampling."""

    task: LanguageModeling
    network: nn.Module
    tokenizer: Any
    seed: int

    @property
    def context(self) -> int | None:
        """The most tokens that a conversation and its answer may have together; None without a limit."""
        most: int | None = getattr(self.network.config, "max_position_embeddings", None)
        return most

    def answer(
        self,
        messages: Sequence[Any],
        how: Decoding,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The assistant's next turn; `on_text` is called with each piece of it as it is generated.

        If the conversation is too long, its oldest turns are left out with a warning; system messages are
        kept. The same messages and seed give the same answer.

        Raises:
            DataError: the messages are invalid, the last one isn't a user's, the last turn alone is too long,
                or the template refuses them.
        """
        turns = turns_cell(list(messages), "messages")
        if not turns or turns[-1]["role"] != USER:
            last_role = turns[-1]["role"] if turns else "nothing"
            raise DataError(f"messages: the last one is of {last_role}, expected one of the {USER}")
        seen, prompt = self._fitting(turns, how.max_new_tokens)
        if left_out := len(turns) - len(seen):
            logger.warning(
                "the conversation is longer than the model's %s tokens: the oldest %d messages are left out",
                self.context, left_out,
            )  # fmt: skip
        device = next(self.network.parameters()).device
        ids = torch.tensor(prompt, dtype=torch.int64, device=device)
        text = written_on(
            self.network, self.tokenizer, ids, how, self.seed if seed is None else seed, on_text
        )
        return Answer(text, seen)

    def _fitting(self, turns: Messages, to_write: int) -> tuple[Messages, list[int]]:
        """(the latest turns that fit into the context together with an answer, their tokens)."""
        assert self.task.template is not None, "whoever has no template has no chat"
        left: Messages | None = turns
        while left is not None:
            prompt = self.task.tokens_of(self.task.template.question(left, "messages"))
            if self.context is None or len(prompt) + to_write <= self.context:
                return left, prompt
            left = _without_the_oldest(left)
        raise DataError(
            f"messages: the last one alone has {len(prompt)} tokens, expected at most {self.context} with the"
            f" {to_write} of an answer"
        )


def _without_the_oldest(turns: Messages) -> Messages | None:
    """The conversation without its first user's turn and the answer to it; None if that is the only one."""
    begin = next(place for place, turn in enumerate(turns) if turn["role"] != SYSTEM)
    users = [place for place, turn in enumerate(turns) if turn["role"] == USER and place > begin]
    return turns[:begin] + turns[users[0] :] if users else None
