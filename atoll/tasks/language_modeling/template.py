"""From a row to tokens, and which of them are learnt: answers and an assistant's turns, never what was asked.

A turn of the assistant is found by rendering the conversation twice, up to it and with it, so that any
template will do, with `{% generation %}` or without. Templates are rendered in transformers' sandbox,
jinja2's ImmutableSandboxedEnvironment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atoll.errors import DataError
from atoll.tasks.language_modeling.data import ASSISTANT, Messages

Span = tuple[int, int]
"""Characters of a text, from the first to behind the last."""


@dataclass(frozen=True)
class Rendered:
    """A text as the network reads it, and the spans of it that are learnt.

    To one that no template wrote the tokenizer adds the tokens that begin and end a text; an end is learnt.
    """

    text: str
    learnt: tuple[Span, ...]
    is_templated: bool


@dataclass(frozen=True)
class Tokens:
    """An example as token ids, and for each whether it is learnt.

    `learnt_bytes` is how long the text is, in UTF-8, that the learnt tokens write; tokens that mark the end
    of a turn write none. `is_cut`: the example was longer.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    learnt_bytes: int
    is_cut: bool = False


class Template:
    """How a conversation is written for a network.

    Raises:
        DataError: from each method, where the template doesn't take a conversation.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._special = tuple(_special_texts(tokenizer))

    @property
    def sha256(self) -> str:
        """Of its source; on it server and sites must agree."""
        return hashlib.sha256(self._source.encode()).hexdigest()

    def conversation(self, messages: Messages, where: str) -> Rendered:
        """The whole conversation, of which the assistant's turns are learnt, each with what ends it."""
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
        """The conversation up to where the assistant's next turn begins."""
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
        """Where what the assistant says begins, behind all that the template says itself."""
        one, other = (
            self._text([*before, {"role": ASSISTANT, "content": content}], where) for content in "01"
        )
        heads = [one[: _shared(one, other)], self._prompt(before)]
        lengths = [len(head) for head in heads if whole.startswith(head)]
        if not lengths:
            raise _rewrites(where)
        return max(lengths)

    def _prompt(self, before: Messages) -> str:
        """The text that asks for an answer; empty where the template has none for these messages."""
        try:
            return self._render(before, asks=True)
        except _errors():
            return ""

    def _without_blanks_behind_the_end(self, whole: str, begin: int, end: int) -> int:
        """Where a turn has its own end token, what the template puts behind it is nobody's answer."""
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
    """How many characters two texts begin with alike."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _rewrites(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template writes a message in another way once others follow, expected one that"
        " keeps what was said"
    )


def _errors() -> tuple[type[Exception], ...]:
    """What rendering a template may raise: what it says itself, and what its expressions run into."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError)


def _special_texts(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def joined(prompt: str, completion: str) -> Rendered:
    """A prompt and what completes it as they stand, without a template."""
    whole = prompt + completion
    return Rendered(whole, ((len(prompt), len(whole)),), is_templated=False)


def whole(text: str) -> Rendered:
    """A text of which all is learnt."""
    return Rendered(text, ((0, len(text)),), is_templated=False)


class Coder:
    """Texts to tokens; what is longer than `most` tokens is cut at the end."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._end: int | None = tokenizer.eos_token_id
        self._special = set(tokenizer.convert_tokens_to_ids(list(_special_texts(tokenizer))))

    def tokens(self, rendered: Rendered) -> Tokens:
        """A token is learnt where it writes a character that is; the first one never is."""
        ids, spans = self._coded(rendered)
        learnt = [_overlaps(span, rendered.learnt) for span in spans]
        if not rendered.is_templated and self._end is not None:
            learnt[-1] = True
        within = slice(None, self._most)
        learnt[:1] = [False]
        size = self._bytes(rendered, ids[within], spans[within], learnt[within])
        return Tokens(tuple(ids[within]), tuple(learnt[within]), size, is_cut=len(ids) > self._most)

    def writes(self, rendered: Rendered, span: Span) -> tuple[bool, ...]:
        """For each of the `tokens`, whether it writes a character of the span."""
        _, spans = self._coded(rendered)
        return tuple(_overlaps(one, (span,)) for one in spans[: self._most])

    def _coded(self, rendered: Rendered) -> tuple[list[int], list[Span]]:
        """The whole text as token ids, and the characters that each writes; those that mark an end, none."""
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
        """The length in UTF-8 of what the learnt tokens write; a letter of several tokens counts once."""
        size, counted = 0, 0
        for token, (begin, end), is_learnt in zip(ids, spans, learnt, strict=True):
            if is_learnt and token not in self._special:
                for first, last in rendered.learnt:
                    text = rendered.text[max(begin, first, counted) : min(end, last)]
                    size += len(text.encode())
                counted = end
        return size


def written_by(offsets: Sequence[Span]) -> list[Span]:
    """The characters that each token writes: those a tokenizer leaves out before a word are the word's.

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
