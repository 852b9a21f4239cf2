"""Converting rows to tokens, and marking the learnt ones: completions and the assistant's turns.

The assistant's turns are found by rendering the conversation up to the turn and with it, so any template
works, with or without `{% generation %}`. Templates are rendered in transformers' sandbox, jinja2's
ImmutableSandboxedEnvironment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atoll.errors import DataError
from atoll.tasks.language_modeling.data import ASSISTANT, Messages

Span = tuple[int, int]
"""(index of the first character, index after the last character) of a part of a text."""


@dataclass(frozen=True)
class Rendered:
    """A text as the network reads it, and its learnt spans.

    If no template wrote it (`is_templated` is false), the tokenizer adds its begin and end tokens; the end
    token is learnt.
    """

    text: str
    learnt: tuple[Span, ...]
    is_templated: bool


@dataclass(frozen=True)
class Tokens:
    """An example as token ids, and whether each is learnt.

    `learnt_bytes` is the size in UTF-8 of the learnt tokens' text; tokens that end a turn have none. `is_cut`
    says that the example was longer.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    learnt_bytes: int
    is_cut: bool = False


class Template:
    """A chat template: writes conversations as the network reads them.

    Raises:
        DataError: from each method, if the template refuses a conversation.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._special = tuple(_special_texts(tokenizer))

    @property
    def sha256(self) -> str:
        """The hash of the template's source, which must be the same at the server and all sites."""
        return hashlib.sha256(self._source.encode()).hexdigest()

    def conversation(self, messages: Messages, where: str) -> Rendered:
        """The whole conversation; learnt are the assistant's turns, each with its end token."""
        whole = self._text(messages, where)
        spans = [
            self._turn(messages, place, whole, where)
            for place, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]
        return Rendered(whole, tuple(spans), is_templated=True)

    def left_out(self, messages: Messages, where: str) -> set[str]:
        """The roles of messages whose content the template doesn't write."""
        whole = self._text(messages, where)
        return {message["role"] for message in messages if message["content"].strip() not in whole}

    def question(self, messages: Messages, where: str) -> str:
        """The conversation up to the place where the assistant's next turn begins."""
        probe = self._text([*messages, {"role": ASSISTANT, "content": "0"}], where)
        return probe[: self._begin(messages, probe, where)]

    def _turn(self, messages: Messages, place: int, whole: str, where: str) -> Span:
        begin = self._begin(messages[:place], whole, where)
        alone, content = self._text(messages[: place + 1], where), messages[place]["content"].strip()
        end = _shared(alone, whole)
        if end < begin or (content in alone[begin:] and content not in whole[begin:end]):
            raise _rewrites(where)
        return begin, self._without_blanks_behind_the_end(whole, begin, end)

    def _begin(self, before: Messages, whole: str, where: str) -> int:
        """The index at which the assistant's own text begins, after everything the template adds."""
        one, other = (
            self._text([*before, {"role": ASSISTANT, "content": content}], where) for content in "01"
        )
        heads = [one[: _shared(one, other)], self._prompt(before)]
        lengths = [len(head) for head in heads if whole.startswith(head)]
        if not lengths:
            raise _rewrites(where)
        return max(lengths)

    def _prompt(self, before: Messages) -> str:
        """The conversation with the template's generation prompt; empty if the template refuses it."""
        try:
            return self._render(before, asks=True)
        except _errors():
            return ""

    def _without_blanks_behind_the_end(self, whole: str, begin: int, end: int) -> int:
        """The end of a turn: `end`, without whitespace that the template adds after the turn's end token."""
        content = whole[begin:end]
        bare = content.rstrip()
        return begin + len(bare) if bare != content and bare.endswith(self._special) else end

    def _text(self, messages: Messages, where: str) -> str:
        try:
            return self._render(messages, asks=False)
        except _errors() as error:
            why = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise DataError(f"{where}: the chat template refuses these messages: {why}") from None

    def _render(self, messages: Messages, *, asks: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._source, tokenize=False, add_generation_prompt=asks
        )
        return text


def _shared(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _rewrites(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template writes a message in another way once others follow, expected one that"
        " keeps what was said"
    )


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions that rendering a template may raise: its own, and those of its expressions."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError)


def _special_texts(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def joined(prompt: str, completion: str) -> Rendered:
    """A prompt and its completion concatenated without a template; the completion is learnt."""
    whole = prompt + completion
    return Rendered(whole, ((len(prompt), len(whole)),), is_templated=False)


def whole(text: str) -> Rendered:
    """A text that is learnt completely."""
    return Rendered(text, ((0, len(text)),), is_templated=False)


class Coder:
    """Converts texts to tokens; longer texts are cut after `most` tokens."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._end: int | None = tokenizer.eos_token_id
        self._special = set(tokenizer.convert_tokens_to_ids(list(_special_texts(tokenizer))))

    def tokens(self, rendered: Rendered) -> Tokens:
        """The tokens of a text; a token is learnt if one of its characters is, but never the first one."""
        ids, spans = self._coded(rendered)
        learnt = [_overlaps(span, rendered.learnt) for span in spans]
        if not rendered.is_templated and self._end is not None:
            learnt[-1] = True
        within = slice(None, self._most)
        learnt[:1] = [False]
        size = self._bytes(rendered, ids[within], spans[within], learnt[within])
        return Tokens(tuple(ids[within]), tuple(learnt[within]), size, is_cut=len(ids) > self._most)

    def writes(self, rendered: Rendered, span: Span) -> tuple[bool, ...]:
        """Whether each of the `tokens` has a character of the span."""
        _, spans = self._coded(rendered)
        return tuple(_overlaps(one, (span,)) for one in spans[: self._most])

    def _coded(self, rendered: Rendered) -> tuple[list[int], list[Span]]:
        """(token ids of the whole text, each one's characters); the span of an added end token is empty."""
        coded = self._tokenizer(
            rendered.text, add_special_tokens=not rendered.is_templated, return_offsets_mapping=True
        )
        ids: list[int] = list(coded["input_ids"])
        spans = written_by(coded["offset_mapping"])
        if not rendered.is_templated and self._end is not None and ids[-1:] != [self._end]:
            ids.append(self._end)
            spans.append((len(rendered.text), len(rendered.text)))
        return ids, spans

    def _bytes(
        self, rendered: Rendered, ids: Sequence[int], spans: Sequence[Span], learnt: Sequence[bool]
    ) -> int:
        """The size in UTF-8 of the learnt tokens' text; a character of several tokens counts once."""
        size, counted = 0, 0
        for token, (begin, end), is_learnt in zip(ids, spans, learnt, strict=True):
            if is_learnt and token not in self._special:
                for first, last in rendered.learnt:
                    text = rendered.text[max(begin, first, counted) : min(end, last)]
                    size += len(text.encode())
                counted = end
        return size


def written_by(offsets: Sequence[Span]) -> list[Span]:
    """The characters of each token; those that a tokenizer skips, such as spaces, belong to the next token.

    >>> written_by([(0, 2), (3, 5), (5, 6), (5, 6)])  # a blank, and a letter of two tokens
    [(0, 2), (2, 5), (5, 6), (5, 6)]
    """
    spans, reached = [], 0
    for begin, end in offsets:
        spans.append((min(begin, reached), max(begin, end)))
        reached = max(reached, end)
    return spans


def _overlaps(span: Span, learnt: Sequence[Span]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in learnt)
