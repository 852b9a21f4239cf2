"""Texts that published packages carry, decoded from their files: the packages' code never runs."""

from __future__ import annotations

import html
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from atoll.data.texts import checked_text
from atoll.downloads.pypi import Progress, fetch_package
from atoll.errors import DataError

_SNIPPETS = {
    "tweet": "tweets",
    "film review": "movieReviewSnippets",
    "product review": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}
"""What a kind's file is called before `_GroundTruth.txt`."""


def rated_snippets(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Tweets and sentences of reviews and editorials: columns text, label, rating, kind and author.

    The rating is the mean of at least fifteen people's, from -4 to 4; its sign is the label. The 383
    snippets that were rated exactly 0 have no sign and are left out. An author is one review or one
    editorial ("editorial 17"). Tweets and film reviews don't tell theirs: each of these two kinds has
    one author, called as the kind is.
    """
    path = fetch_package("vaderSentiment", offline=offline, progress=progress) / "hutto_ICWSM_2014.tar.gz"
    columns: dict[str, list[Any]] = {name: [] for name in ("text", "label", "rating", "kind", "author")}
    for kind, name in _SNIPPETS.items():
        member = f"hutto_ICWSM_2014/{name}_GroundTruth.txt"
        for where, (number, mean, text) in _lines(path, member):
            item, is_part, _ = number.partition("_")
            rating = float(mean)
            if rating:
                columns["text"].append(checked_text(html.unescape(text).encode(), where))
                columns["label"].append("positive" if rating > 0 else "negative")
                columns["rating"].append(rating)
                columns["kind"].append(kind)
                columns["author"].append(f"{kind} {item}" if is_part else kind)
    return {"train": pa.table(columns)}


SNIPPETS_EACH = 8
"""Of an author in `asked_snippets`: the first ones, as many as a laptop tunes a language model to."""
_RATINGS = ("positive", "negative")


def asked_snippets(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Snippets of authors who are known, asked about: `rated_snippets`' columns, question, choices, answer.

    Authors are reviews and editorials of `SNIPPETS_EACH` snippets or more. The answer is the place of the
    label in the choices, from 0.
    """
    rows = rated_snippets(offline, progress)["train"].to_pylist()
    by_author: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["author"] != row["kind"]:
            by_author.setdefault(row["author"], []).append(row)
    chosen = [row for own in by_author.values() if len(own) >= SNIPPETS_EACH for row in own[:SNIPPETS_EACH]]
    for row in chosen:
        row["question"] = f'Is this sentence positive or negative? "{row["text"]}"'
        row["choices"], row["answer"] = list(_RATINGS), _RATINGS.index(row["label"])
    return {"train": pa.Table.from_pylist(chosen)}


def _lines(path: Path, member: str) -> Iterator[tuple[str, list[str]]]:
    """A file's lines of three columns, each with the words that name it."""
    with tarfile.open(path, "r:gz") as archive:
        file = archive.extractfile(member)
        if file is None:
            raise DataError(f"{path}: {member} is no file, expected one of three columns")
        data = file.read()
    for number, line in enumerate(data.decode("utf-8").split("\r\n"), start=1):
        where, cells = f"{path}: {member} line {number}", line.split("\t")
        if len(cells) != 3:
            raise DataError(f"{where} has {len(cells)} columns, expected 3")
        yield where, cells


MIN_REPLIES = 10
"""Who replied less often is no client to learn at and to measure on."""


def chitchat(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Turns of chats and what was replied to them: columns question, answer, sender, conversation.

    What a person sends in a row is one turn. Each but a conversation's first answers the one before, so
    most turns are an answer once and then a question; `sender` is who answers. Pairs with a turn of
    nothing but blanks are left out, and so are the answers of people who gave fewer than `MIN_REPLIES`.
    """
    path = fetch_package("chitchat-dataset", offline=offline, progress=progress) / "dataset.json"
    replies = list(_replies(json.loads(path.read_bytes())))
    counts = Counter(reply["sender"] for reply in replies)
    chosen = [reply for reply in replies if counts[reply["sender"]] >= MIN_REPLIES]
    for reply in chosen:
        for role in ("question", "answer"):
            checked_text(reply[role].encode(), f"{path}: {role} in {reply['conversation']}")
    return {"train": pa.Table.from_pylist(chosen)}


def _replies(conversations: dict[str, Any]) -> Iterator[dict[str, str]]:
    for name, conversation in conversations.items():
        turns = [(turn[0]["sender"], _turn_text(turn)) for turn in conversation["messages"]]
        for (_, question), (sender, answer) in pairwise(turns):
            if question and answer:
                yield {"question": question, "answer": answer, "sender": sender, "conversation": name}


MIN_TURNS = 50
"""Who said less often is left out of `chats`."""
TURNS = 4
"""Of a conversation that are one example of `chats`."""
CHATS_EACH = 20
"""Examples of a person in `chats`: the first ones, so that a model can be tuned to them on a laptop."""


def chats(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Conversations as each of their people has them: columns messages, sender, conversation.

    What `sender` says is the assistant's, what the other says the user's. A conversation is cut into pieces
    of `TURNS` turns, a turn being what a person sends in a row; a piece in which `sender` is silent is left
    out, and so is a blank turn. People of `MIN_TURNS` turns or more are there, each with the first
    `CHATS_EACH`.
    """
    path = fetch_package("chitchat-dataset", offline=offline, progress=progress) / "dataset.json"
    conversations = json.loads(path.read_bytes())
    counts = _turns_said(conversations)
    chosen: list[dict[str, Any]] = []
    replies_of: Counter[str] = Counter()
    for name, conversation in conversations.items():
        for sender, messages in _pieces(conversation["messages"]):
            if counts[sender] >= MIN_TURNS and replies_of[sender] < CHATS_EACH:
                replies_of[sender] += 1
                chosen.append({"messages": messages, "sender": sender, "conversation": name})
    return {"train": pa.Table.from_pylist(chosen)}


def chat_replies(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Replies of people of `chats` that ask something back, each beside one of theirs that doesn't.

    Columns prompt, chosen, rejected, sender, conversation. A reply asks back if it has a question mark. What
    is replied to is, in turn, what came before the chosen and before the rejected one, so it doesn't tell
    them apart. Each person's first `CHATS_EACH` pairs are there, of people who have so many.
    """
    path = fetch_package("chitchat-dataset", offline=offline, progress=progress) / "dataset.json"
    conversations = json.loads(path.read_bytes())
    counts = _turns_said(conversations)
    replies_of: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {}
    for reply in _replies(conversations):
        asking, telling = replies_of.setdefault(reply["sender"], ([], []))
        (asking if "?" in reply["answer"] else telling).append(reply)
    chosen: list[dict[str, str]] = []
    for sender, (asking, telling) in replies_of.items():
        if counts[sender] >= MIN_TURNS and min(len(asking), len(telling)) >= CHATS_EACH:
            pairs = zip(asking[:CHATS_EACH], telling[:CHATS_EACH], strict=True)
            chosen += [_preference(*pair, number % 2) for number, pair in enumerate(pairs)]
    return {"train": pa.Table.from_pylist(chosen)}


def _preference(asking: dict[str, str], telling: dict[str, str], place: int) -> dict[str, str]:
    answered = (asking, telling)[place]
    return {
        "prompt": answered["question"],
        "chosen": asking["answer"],
        "rejected": telling["answer"],
        "sender": answered["sender"],
        "conversation": answered["conversation"],
    }


def _turns_said(conversations: dict[str, Any]) -> Counter[str]:
    """How many turns each person said in all conversations."""
    return Counter(turn[0]["sender"] for each in conversations.values() for turn in each["messages"])


def _pieces(turns: list[list[dict[str, str]]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(who is the assistant, the messages of a piece), for each person of each piece."""
    messages = [(turn[0]["sender"], text) for turn in turns if (text := _turn_text(turn))]
    for start in range(0, len(messages), TURNS):
        piece = messages[start : start + TURNS]
        for sender in dict.fromkeys(who for who, _ in piece):
            yield (
                sender,
                [{"role": "assistant" if who == sender else "user", "content": text} for who, text in piece],
            )


def _turn_text(turn: list[dict[str, str]]) -> str:
    return " ".join(text for message in turn if (text := message["text"].strip()))
