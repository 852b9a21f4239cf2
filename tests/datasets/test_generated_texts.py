"""Generated questions have right answers, and generated commands have a tag for each word."""

import re
from functools import cache

import pyarrow as pa
import pytest

from atoll.datasets.synthetic.commands import INTENTS, SLOTS, generated_commands
from atoll.datasets.synthetic.questions import KINDS, generated_questions
from atoll.tasks.token_classification.metrics import spans


@cache
def questions() -> dict[str, pa.Table]:
    return generated_questions()


@cache
def commands() -> dict[str, pa.Table]:
    return generated_commands()


def rows(splits: dict[str, pa.Table]) -> list[dict]:
    return pa.concat_tables(splits.values()).to_pylist()


@pytest.mark.parametrize("make", [generated_questions, generated_commands])
def test_a_seed_gives_the_same_texts_and_another_gives_others(make):
    assert rows(make(3, 60)) == rows(make(3, 60)) != rows(make(4, 60))


def test_three_thousand_different_questions_of_every_kind():
    assert [table.num_rows for table in questions().values()] == [2400, 600]
    asked = rows(questions())
    assert len({(row["context"], row["question"]) for row in asked}) == 3000
    assert all([row["kind"] for row in asked].count(kind) == 500 for kind in KINDS)


def worked_out(context: str, question: str) -> str:
    """The answer, by reading."""
    if sum_ := re.fullmatch(r"what is (\d+) (plus|minus) (\d+)\?", question):
        left, sign, right = sum_.groups()
        return str(int(left) + int(right) if sign == "plus" else int(left) - int(right))
    has = {name: int(number) for name, number in re.findall(r"(\w+) has (\d+)", context)}
    if asked := re.fullmatch(r"how many \w+ has (\w+)\?", question):
        return str(has[asked[1]])
    if question.startswith("who has more"):
        return max(has, key=has.__getitem__)
    subject = question.rstrip("?").split()[-1]
    said = re.search(rf"{subject} is (in the )?(\w+)", context)
    assert said is not None
    return ("the " if said[1] else "") + said[2]


def test_every_answer_is_right_and_questions_alone_do_not_tell_it():
    for row in rows(questions()):
        assert row["answer"] == worked_out(row["context"], row["question"])
        assert (row["context"] == "") == (row["kind"] in ("sum", "difference"))
    assert not any(row["answer"].startswith("-") for row in rows(questions()))


def test_two_thousand_different_commands_have_a_tag_for_each_word():
    assert [table.num_rows for table in commands().values()] == [1600, 400]
    said = rows(commands())
    assert len({row["text"] for row in said}) == 2000
    assert all(len(row["text"].split()) == len(row["slots"].split()) for row in said)
    assert {row["intent"] for row in said} == set(INTENTS) and len(INTENTS) == 8
    assert len({row["speaker"] for row in said}) == 20


def test_tags_mark_just_the_values_of_slots():
    seen = {slot: set() for slot in SLOTS}
    for row in rows(commands()):
        words, tags = row["text"].split(), row["slots"].split()
        forms = [set(re.findall(r"{(\w+)}", form)) for form in INTENTS[row["intent"]]]
        found = list(spans(tags))
        assert {slot for slot, _, _ in found} in forms
        for slot, first, last in found:
            assert tags[first] == f"B-{slot}"
            seen[slot].add(" ".join(words[first : last + 1]))
    assert seen == {slot: set(values) for slot, values in SLOTS.items()} and len(SLOTS) == 6


def test_the_test_split_has_every_intent_and_speakers_differ_in_theirs():
    assert set(commands()["test"]["intent"].to_pylist()) == set(INTENTS)
    said = rows(commands())
    wanted = {}
    for row in said:
        wanted.setdefault(row["speaker"], []).append(row["intent"])
    favourites = [max(own.count(intent) for intent in INTENTS) / len(own) for own in wanted.values()]
    # Drawn alike, an intent would be an eighth of what a speaker says.
    assert sum(favourites) / len(favourites) > 0.3
