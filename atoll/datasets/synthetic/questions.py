"""Questions with one right answer each: sums, about a sentence, and which of some things is of a kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.protocol.random_streams import stream_seed

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kira", "Leo")
_THINGS = ("apples", "books", "coins", "pens", "cups", "keys", "shells", "stamps", "plums", "cards")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
_OBJECTS = ("door", "car", "hat", "boat", "lamp", "chair", "coat", "bowl", "ball", "box")
_PLACES = ("garden", "kitchen", "library", "harbour", "station", "office", "market", "forest")

_KINDS_OF_THINGS = {
    "a fruit": ("apple", "plum", "pear", "cherry", "lemon", "peach", "grape", "fig"),
    "an animal": ("horse", "goat", "otter", "heron", "badger", "trout", "beetle", "fox"),
    "a tool": ("hammer", "saw", "chisel", "pliers", "drill", "spade", "rake", "file"),
    "a vehicle": ("bus", "tram", "ferry", "lorry", "bicycle", "sledge", "train", "van"),
    "a garment": ("coat", "scarf", "glove", "sock", "shirt", "skirt", "vest", "hat"),
    "an instrument": ("flute", "violin", "drum", "harp", "organ", "cello", "oboe", "lute"),
    "a building": ("church", "barn", "tower", "mill", "castle", "school", "stable", "inn"),
    "a dish": ("soup", "stew", "salad", "porridge", "omelette", "curry", "pie", "pudding"),
}
_WHICH = ("Which of these is {kind}?", "Which one is {kind}?", "What here is {kind}?")
_SCHOOLS = 8
# Below 1: each school asks mostly for a few kinds.
_SYLLABUS = 0.5

Question = tuple[str, str, str]
"""(context, question, answer)"""


def generated_questions(seed: int = 0, count: int = 3000) -> dict[str, pa.Table]:
    """Different questions, as many of each kind: columns question, context (may be empty), answer, kind.

    There are 1,681 different sums, and with them an end to how many questions can be asked: 10,000.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-questions"))
    return cut(_table(_drawn_questions(rng, count, tuple(_KINDS), set())))


def generated_stories(seed: int = 0, count: int = 10_000) -> dict[str, pa.Table]:
    """As `generated_questions`, to pretrain on: three kinds of six, and none of the same seed's questions."""
    rng = np.random.default_rng(stream_seed(seed, "generated-stories"))
    elsewhere = pa.concat_tables(generated_questions(seed).values()).to_pylist()
    others = {(row["context"], row["question"], row["answer"]) for row in elsewhere}
    return cut(_table(_drawn_questions(rng, count, ("more", "place", "owned"), others)))


def generated_choices(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Different questions of 3 to 5 choices: columns question, choices, answer (a place), school (of 8)."""
    rng = np.random.default_rng(stream_seed(seed, "generated-choices"))
    kinds = tuple(_KINDS_OF_THINGS)
    taught = rng.dirichlet(np.full(len(kinds), _SYLLABUS), _SCHOOLS)
    questions: dict[tuple[str, tuple[str, ...]], tuple[int, str]] = {}
    while len(questions) < count:
        school = int(rng.integers(_SCHOOLS))
        right = int(rng.choice(len(kinds), p=taught[school]))
        others = [kind for kind in rng.permutation(len(kinds)) if kind != right][: rng.integers(2, 5)]
        place = int(rng.integers(len(others) + 1))
        order = [*others[:place], right, *others[place:]]
        things = tuple(_one(rng, _KINDS_OF_THINGS[kinds[kind]]) for kind in order)
        question = _one(rng, _WHICH).format(kind=kinds[right])
        questions.setdefault((question, things), (place, f"school-{school}"))
    return cut(
        pa.table(
            {
                "question": pa.array([question for question, _ in questions], pa.string()),
                "choices": pa.array([list(things) for _, things in questions], pa.list_(pa.string())),
                "answer": pa.array([place for place, _ in questions.values()], pa.int64()),
                "school": pa.array([school for _, school in questions.values()], pa.string()),
            }
        ),
        test=0.1,
    )


def question_words() -> set[str]:
    """Every word of the questions, their contexts and answers, but for numbers."""
    text = "what is plus minus how many has who have more colour where the and in The"
    listed = (*_NAMES, *_THINGS, *_COLOURS, *_OBJECTS, *_PLACES)
    return {*text.split(), *listed, "question", "context"}


def _drawn_questions(
    rng: np.random.Generator, count: int, kinds: tuple[str, ...], others: set[Question]
) -> dict[Question, str]:
    """Different questions with their kinds, none of the others."""
    questions: dict[Question, str] = {}
    while len(questions) < count:
        kind = kinds[len(questions) % len(kinds)]
        question = _KINDS[kind](rng)
        if question not in others:
            questions.setdefault(question, kind)
    return questions


def _table(questions: dict[Question, str]) -> pa.Table:
    rows = [(question, context, answer, kind) for (context, question, answer), kind in questions.items()]
    columns = zip(("question", "context", "answer", "kind"), zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns})


def _two(rng: np.random.Generator, words: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.choice(len(words), 2, replace=False)
    return words[first], words[second]


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _sum(rng: np.random.Generator) -> Question:
    a, b = rng.integers(0, 41, 2)
    return "", f"what is {a} plus {b}?", str(a + b)


def _difference(rng: np.random.Generator) -> Question:
    b, a = sorted(rng.integers(0, 61, 2))
    return "", f"what is {a} minus {b}?", str(a - b)


def _owned(rng: np.random.Generator) -> Question:
    (one, other), things = _two(rng, _NAMES), _one(rng, _THINGS)
    a, b = rng.integers(1, 21, 2)
    colour = _one(rng, _COLOURS)
    owner, answer = ((one, a), (other, b))[rng.integers(2)]
    context = f"{one} has {a} {colour} {things} and {other} has {b}."
    return context, f"how many {things} has {owner}?", str(answer)


def _more(rng: np.random.Generator) -> Question:
    (one, other), things = _two(rng, _NAMES), _one(rng, _THINGS)
    a, b = rng.choice(np.arange(1, 21), 2, replace=False)
    context = f"{one} has {a} {things} and {other} has {b}."
    return context, f"who has more {things}?", one if a > b else other


def _colour(rng: np.random.Generator) -> Question:
    (one, other), (first, second) = _two(rng, _OBJECTS), _two(rng, _COLOURS)
    thing, answer = ((one, first), (other, second))[rng.integers(2)]
    return f"The {one} is {first} and the {other} is {second}.", f"what colour is the {thing}?", answer


def _place(rng: np.random.Generator) -> Question:
    (one, other), (first, second) = _two(rng, _NAMES), _two(rng, _PLACES)
    person, answer = ((one, first), (other, second))[rng.integers(2)]
    return f"{one} is in the {first} and {other} is in the {second}.", f"where is {person}?", f"the {answer}"


_KINDS: dict[str, Callable[[np.random.Generator], Question]] = {
    "sum": _sum,
    "difference": _difference,
    "owned": _owned,
    "more": _more,
    "colour": _colour,
    "place": _place,
}
KINDS = tuple(_KINDS)
