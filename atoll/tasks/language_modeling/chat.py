"""Conversations with a trained causal model, as long as its context allows."""

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
    """What the model says, and the messages that it has seen: without the oldest ones where all don't fit."""

    text: str
    seen: Messages


@dataclass(frozen=True)
class Chat:
    """A causal network that is asked by a task's template; `seed` is what a job draws by."""

    task: LanguageModeling
    network: nn.Module
    tokenizer: Any
    seed: int

    @property
    def context(self) -> int | None:
        """The most tokens of a conversation and its answer together; None where any number will do."""
        most: int | None = getattr(self.network.config, "max_position_embeddings", None)
        return most

    def answer(
        self,
        messages: Sequence[Any],
        how: Decoding,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The assistant's next turn, of which `on_text` is given each piece once it is written.

        Where a conversation is too long its oldest turns are left out, which a warning tells; what the system
        says stays. The same messages and seed get the same answer.

        Raises:
            DataError: they are no messages, the last one isn't a user's, the last turn alone is too long, or
            the template refuses them.
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
        """(the latest turns that fit with their answer into the context, their tokens)."""
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
    """Without the first of a user's turns and what answers it; None where there is only one."""
    begin = next(place for place, turn in enumerate(turns) if turn["role"] != SYSTEM)
    users = [place for place, turn in enumerate(turns) if turn["role"] == USER and place > begin]
    return turns[:begin] + turns[users[0] :] if users else None
