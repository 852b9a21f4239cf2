"""When a message is sent again: with growing pauses, and anew where it is known to be lost."""

from __future__ import annotations

import math

import pytest

from atoll.server.resending import HELLO_AGAIN_SECONDS, RESEND_PART, RESEND_SECONDS, ResendSchedule


def moments(schedule: ResendSchedule, until: int) -> list[int]:
    return [now for now in range(until) if schedule.late(now)]


@pytest.mark.parametrize(
    ("kind", "timeout", "first"),
    [
        ("train", 40.0, 40 * RESEND_PART),
        ("evaluate", 40.0, 40 * RESEND_PART),
        ("train", 86_400.0, RESEND_SECONDS),
        ("query", 86_400.0, HELLO_AGAIN_SECONDS),
    ],
)
def test_the_pause_begins_by_kind_and_timeout_and_doubles(kind: str, timeout: float, first: float) -> None:
    sent = moments(ResendSchedule([7], kind, timeout, 0.0), int(8 * first))
    assert sent == [0, first, 3 * first, 7 * first]


def test_a_message_known_to_be_lost_is_sent_at_the_time_given_and_its_pauses_begin_anew() -> None:
    schedule = ResendSchedule([7, 8], "train", 40.0, 0.0)
    assert schedule.late(0.0) == [7, 8]
    assert schedule.late(10.0) == [7, 8]
    schedule.is_lost(7, at=12.0)
    assert moments(schedule, 60) == [12, 22, 30, 42]  # 30: node 8, after twice ten seconds


def test_a_node_that_is_gone_is_sent_nothing_until_it_is_back() -> None:
    schedule = ResendSchedule([7], "train", 40.0, 0.0)
    assert schedule.late(0.0) == [7]
    schedule.is_lost(7)
    assert schedule.late(math.nextafter(math.inf, 0.0)) == []
    assert 7 in schedule
    schedule.is_lost(7, at=50.0)
    assert schedule.late(50.0) == [7]


def test_who_has_answered_is_sent_nothing_more_unless_the_answer_is_not_its_own() -> None:
    schedule = ResendSchedule([7, 8], "train", 40.0, 0.0)
    schedule.answered(7)
    assert (7 in schedule, len(schedule), list(schedule)) == (False, 1, [8])
    assert schedule.late(0.0) == [8]
    schedule.is_lost(7, at=1.0)
    assert schedule.late(1.0) == [7]
