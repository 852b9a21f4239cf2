"""A secure sum as the clients of one process answer it, stage by stage, in and out of order."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.dp.secure_aggregation import (
    SecureAggregationSession,
    cohort_of,
    contributions,
    share_random_bits,
    sums,
)
from atoll.job.job import Job
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import entropy
from atoll.privacy.secagg import unmask_sum
from atoll.privacy.secagg_encoding import PLAIN_GRANULARITY, FixedPointCodec, as_bytes, as_tensor, context_of
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Reply, SecureMessage, Update
from atoll.protocol.requests import (
    ConfirmRequest,
    KeysRequest,
    MaskedSumRequest,
    RevealRequest,
    SharesRequest,
    SumRequest,
    UnmaskedSumRequest,
)
from tests.support.small import image_job

NAMES = ("a", "b", "c", "d")
VALUES = {"a": [0.5, 1.0], "b": [-2.0, 0.25], "c": [10.0, 0.0], "d": [0.125, -8.0]}
MODEL = {"w": torch.zeros(2)}
PROMISE = {
    "unit": "client", "where": "distributed", "noise_multiplier": 1.0, "delta": 1e-5, "clipping_norm": 1.0,
}  # fmt: skip


def job(**tables: Any) -> Job:
    return image_job("raw:pixels", **tables)


PLAIN = job(federation={"clients": 4, "secure_aggregation": True})


def origin(setting: Job = PLAIN, attempt: int = 1, threshold: int = 3) -> dict[str, Any]:
    return {
        "job": setting.canonical, "job_hash": setting.hash, "round": 2, "data_info": {}, "run": "r",
        "attempt": attempt, "threshold": threshold,
    }  # fmt: skip


def answers(session: SecureAggregationSession, request: SumRequest, names: Iterable[str] = NAMES) -> Any:
    """What each client sends, by name; a failure's reason where it sends none."""
    return {reply.client: content_of(reply) for reply in session.answer(request, list(names))}


def content_of(reply: Reply) -> Any:
    if isinstance(reply, Failure):
        return reply.reason
    assert isinstance(reply, SecureMessage) and reply.round == 2
    return reply.content


def keys(session: SecureAggregationSession, **of: Any) -> dict[str, bytes]:
    sent = answers(session, KeysRequest(**(origin() | of)))
    return {name: as_bytes(content["keys"]) for name, content in sent.items()}


def shares(session: SecureAggregationSession, public: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What the others dealt to each client."""
    wanted = {name: as_tensor(key) for name, key in public.items()}
    dealt = answers(session, SharesRequest(**origin(), public_keys=wanted))
    return {
        name: {other: content[name] for other, content in dealt.items() if other != name} for name in dealt
    }


def masked(session: SecureAggregationSession, dealt: Any) -> dict[str, Reply]:
    request = MaskedSumRequest(**origin(), tensors=MODEL, shares=dealt)
    values = [(name, torch.tensor([*numbers, 1.0, 0.0, 0.0]).double()) for name, numbers in VALUES.items()]
    replies = session.encode_contributions(PLAIN, request, values, {"a": 3, "b": 5})
    return {reply.client: reply for reply in replies}


def test_five_stages_open_the_sum_and_no_vector() -> None:
    session = SecureAggregationSession()
    public = keys(session)
    dealt = shares(session, public)
    sent = {name: content_of(reply) for name, reply in masked(session, dealt).items()}
    vectors = {name: content["vector"].numpy().view(np.uint64) for name, content in sent.items()}
    assert [float(content[CHARGED_ROUNDS]) for content in sent.values()] == [3, 5, 0, 0]
    confirmed = answers(session, ConfirmRequest(**origin(), survivors=NAMES))
    signatures = {name: content["signature"] for name, content in confirmed.items()}
    revealed = answers(session, RevealRequest(**origin(), survivors=NAMES, signatures=signatures))
    opened = {name: {o: as_bytes(t) for o, t in content.items()} for name, content in revealed.items()}
    context = context_of(KeysRequest(**origin()))
    total = unmask_sum(public, list(NAMES), vectors, opened, 3, context)
    numbers = total.view(np.int64).astype(np.float64) * PLAIN_GRANULARITY
    assert numbers.tolist() == [8.625, -6.75, 4.0, 0.0, 0.0]
    for name, vector in vectors.items():
        plain = np.rint(np.array(VALUES[name]) / PLAIN_GRANULARITY).astype(np.int64).view(np.uint64)
        assert not np.any(vector[:2] == plain)


def test_keys_are_the_same_when_asked_again_and_others_in_another_attempt() -> None:
    session = SecureAggregationSession()
    first = keys(session)
    assert keys(session) == first
    assert not set(keys(session, attempt=2).values()) & set(first.values())
    assert not set(keys(session).values()) & set(first.values())  # what the second attempt replaced is gone


def test_a_site_that_was_started_anew_says_so_in_every_later_stage() -> None:
    session = SecureAggregationSession()
    public = keys(session)
    dealt = shares(session, public)
    anew, why = SecureAggregationSession(), "its site was started anew in the middle of the round"
    wanted = {name: as_tensor(key) for name, key in public.items()}
    later = [
        SharesRequest(**origin(), public_keys=wanted),
        ConfirmRequest(**origin(), survivors=NAMES),
        RevealRequest(**origin(), survivors=NAMES, signatures={}),
    ]
    for request in later:
        assert answers(anew, request) == dict.fromkeys(NAMES, why)
    assert {n: content_of(r) for n, r in masked(anew, dealt).items()} == dict.fromkeys(NAMES, why)
    # The same where the process knows the clients, but from another attempt.
    assert answers(session, SharesRequest(**origin(attempt=2), public_keys=wanted)) == dict.fromkeys(
        NAMES, why
    )


def test_a_vector_that_is_asked_for_before_shares_were_dealt_is_refused() -> None:
    """Nor may its noise be a share of a threshold that nobody has set."""
    promised = job(federation={"clients": 4}, privacy=PROMISE)
    for setting in (PLAIN, promised):
        session = SecureAggregationSession()
        keys(session)
        request = MaskedSumRequest(**origin(setting), tensors=MODEL, shares={})
        values = [("a", torch.zeros(2 if setting is promised else 5, dtype=torch.float64))]
        [reply] = session.encode_contributions(setting, request, values, {})
        assert isinstance(reply, Failure) and reply.reason == "no shares were dealt yet in this round"


def test_a_threshold_under_half_of_the_jobs_cohort_is_refused() -> None:
    session = SecureAggregationSession()
    public = {name: as_tensor(key) for name, key in keys(session).items()}
    told = answers(session, SharesRequest(**origin(threshold=2), public_keys=public))
    assert all("threshold 2" in reason for reason in told.values()), told


def test_a_share_of_the_noise_is_as_large_as_the_threshold_that_was_dealt_with() -> None:
    """Whatever the request for the vector says: a server that names a larger one gets no less noise."""
    promised = job(federation={"clients": 4}, privacy=PROMISE)
    spread = {}
    for threshold in (3, 100):
        session = SecureAggregationSession()
        dealt = shares(session, keys(session))
        request = MaskedSumRequest(
            **(origin(promised) | {"threshold": threshold}), tensors={"w": torch.zeros(4000)}, shares=dealt
        )
        person = session.participants["a"]
        values = [("a", torch.zeros(4000, dtype=torch.float64))]
        [reply] = session.encode_contributions(promised, request, values, {})
        assert isinstance(reply, SecureMessage)
        assert person.threshold == 3
        spread[threshold] = unmasked_deviation(session, reply.content["vector"], promised)
    assert spread[3] == pytest.approx(spread[100], rel=0.1)


def unmasked_deviation(session: SecureAggregationSession, vector: torch.Tensor, setting: Job) -> float:
    """Of a client's vector once its own masks are off, which only its own process can do."""
    from atoll.privacy.secagg import _add_pairwise, agreed_seed, mask_key_of, mask_of

    person = session.participants["a"]
    total = vector.numpy().view(np.uint64) - mask_of(person._seed, len(vector))
    for name in NAMES[1:]:
        pairwise = np.zeros(len(vector), dtype=np.uint64)
        shared = agreed_seed(person._mask_key, mask_key_of(person._keys[name]), person.context)
        _add_pairwise(pairwise, "a", name, shared)
        total = total - pairwise
    codec = FixedPointCodec.of(dp_plan_of(setting, "client"), len(vector), 3, entropy)
    return float(codec.values(total).std())


def test_without_masks_the_requests_threshold_says_how_much_noise() -> None:
    promised = job(federation={"clients": 4}, privacy=PROMISE)
    request = UnmaskedSumRequest(**origin(promised, threshold=4), tensors={"w": torch.zeros(4000)})
    values = [("a", torch.zeros(4000, dtype=torch.float64))]
    [reply] = SecureAggregationSession().encode_contributions(promised, request, values, {"a": 1})
    assert isinstance(reply, SecureMessage)
    codec = FixedPointCodec.of(dp_plan_of(promised, "client"), 4000, 4, entropy)
    noise = codec.values(reply.content["vector"].numpy().view(np.uint64))
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)


def test_the_grid_is_that_of_as_many_numbers_as_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server computes it from the same count, and could not add up integers of another grid."""
    seen: list[int] = []
    made = FixedPointCodec.of

    def note(plan: Any, numbers: int, *rest: Any) -> FixedPointCodec:
        seen.append(numbers)
        return made(plan, numbers, *rest)

    monkeypatch.setattr(FixedPointCodec, "of", note)
    promised = job(federation={"clients": 4}, privacy=PROMISE)
    for setting, count in ((PLAIN, 5), (promised, 2)):
        request = UnmaskedSumRequest(**origin(setting), tensors=MODEL)
        values = [("a", torch.zeros(count, dtype=torch.float64))]
        [reply] = SecureAggregationSession().encode_contributions(setting, request, values, {})
        assert isinstance(reply, SecureMessage) and len(reply.content["vector"]) == seen.pop() == count


def test_a_number_that_fits_no_sum_is_a_failure_of_its_client_alone() -> None:
    request = UnmaskedSumRequest(**origin(), tensors=MODEL)
    values = [("a", torch.full((5,), 3e9).double()), ("b", torch.ones(5).double())]
    first, second = SecureAggregationSession().encode_contributions(PLAIN, request, values, {})
    assert isinstance(first, Failure) and "too large for a secure sum" in first.reason
    assert isinstance(second, SecureMessage)


def test_what_a_client_contributes_is_weighted_or_clipped() -> None:
    states = {"train_loss.sum": torch.tensor(1.0), "train_loss.count": torch.tensor(2.0)}
    update = Update("a", 2, {"w": torch.tensor([3.0, 4.0])}, 10, states)
    [(name, plain)] = contributions([update], None, PLAIN.federation)
    assert (name, plain.tolist()) == ("a", [30.0, 40.0, 10.0, 1.0, 2.0])
    plan = dp_plan_of(job(privacy=PROMISE), "client")
    [(name, private)] = contributions([update], plan, PLAIN.federation)
    assert private.tolist() == pytest.approx([0.6, 0.8])
    [(name, total)] = sums([("b", {"w": torch.tensor([1.0, 2.0])})])
    assert (name, total.tolist()) == ("b", [1.0, 2.0])


def test_the_cohort_and_the_noises_source_are_the_jobs() -> None:
    assert cohort_of(PLAIN) == 4
    assert cohort_of(job(federation={"clients": 4, "cohort": 3})) == 3
    seeded = job(federation={"clients": 4}, privacy=PROMISE | {"seeded_noise": True})
    assert share_random_bits(job(privacy=PROMISE), 1, "a") is entropy
    ones = [share_random_bits(seeded, round, name)(4).tolist() for round, name in ((1, "a"), (1, "a"))]
    others = [share_random_bits(seeded, round, name)(4).tolist() for round, name in ((2, "a"), (1, "b"))]
    assert ones[0] == ones[1] and ones[0] not in others
