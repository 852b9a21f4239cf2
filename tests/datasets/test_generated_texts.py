"""Generated questions have right answers, and generated commands have a tag for each word."""

import re
from functools import cache

import pyarrow as pa
import pytest

from atoll.datasets.synthetic.commands import INTENTS, SLOTS, generated_commands
from atoll.datasets.synthetic.questions import KINDS, generated_questions
from atoll.datasets.synthetic.reports import generated_reports
from atoll.tasks.token_classification.metrics import spans


@cache
def questions() -> dict[str, pa.Table]:
    return generated_questions()


@cache
def commands() -> dict[str, pa.Table]:
    return generated_commands()


def rows(splits: dict[str, pa.Table]) -> list[dict]:
    return pa.concat_tables(splits.values()).to_pylist()


@pytest.mark.parametrize("make", [generated_questions, generated_commands, generated_reports])
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


def test_the_line_in_the_log_says_what_a_report_says_and_no_word_of_it_suffices():
    reports = generated_reports()
    assert [table.num_rows for table in reports.values()] == [3200, 800]
    in_short = {
        "lost oil": "oil", "got hot": "heat", "made a noise": "noise", "shook": "shaking",
        "stood still": "stop", "changed the belt": "new belt", "cleaned it": "cleaned",
        "called the firm": "firm called", "turned it off": "off",
    }  # fmt: skip
    for row in rows(reports):
        trouble = re.search(r"The (\w+ \d) ([a-z ]+)\.", row["source"])
        deed = re.search(r"We ([a-z ]+)\.", row["source"])
        assert trouble and deed and len(re.findall(r"The \w+ \d ", row["source"])) == 1
        assert row["target"] == f"{trouble[1]}: {in_short[trouble[2]]}, {in_short[deed[1]]}"
        fine = re.search(r"The (\w+) ran well\.", row["source"])
        assert fine is None or not row["target"].startswith(fine[1])
        assert 3 <= row["source"].count(".") <= 5
    firsts = {row["source"].split(". ")[0] for row in rows(reports)}
    lasts = {row["source"].rstrip(".").split(". ")[-1] for row in rows(reports)}
    assert "Lunch was late" in firsts & lasts and "We cleaned it" in lasts
    assert any(re.fullmatch(r"The saw \d shook", sentence) for sentence in firsts)
    assert {row["workshop"] for row in rows(reports)} == {f"workshop-{number}" for number in range(6)}
