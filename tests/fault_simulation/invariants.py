"""What must be true of every federation, whatever happened to it: each function names what isn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.fault_simulation.faults import FORGERIES, Scenario
from tests.fault_simulation.observed import Merged, Observed

Invariant = Callable[[Scenario, Observed, str], Iterator[str]]
"""(scenario, what was seen, the undisturbed run's model): a line for each violation."""

RECOVERABLE = {
    "request dropped", "request twice", "reply dropped", "reply twice", "site killed before its work",
    "site killed after its work", "site loses power", "server killed", "server loses power",
    "push broken off", "killed at a write", "killed at a sync", "killed at a rename",
    "power lost at a write", "power lost at a sync", "power lost at a rename", "checkpoint damaged",
    *FORGERIES,
}  # fmt: skip
"""Faults after which every client comes back in time, or is asked again."""

MOST = {
    "replies kept": 1,
    "learners kept": 1,
    "secure sums kept": 1,
    "checkpoints kept": 3,
    "states kept": 6,
    "messages waited for, a site": 12,
    "greetings of a site": 12,
}
"""How large queues and memories may be."""


def same_bits(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """Where no round went on without a client, the model is the undisturbed run's bit for bit."""
    if seen.result is None or "privacy" in scenario.job:
        return
    everybody = scenario.clients - bool(scenario.refusing)
    rounds = seen.result.rounds
    if len(rounds) < scenario.rounds:  # the disk was full, and it isn't known who was set aside
        return
    if all(not line["set_aside"] and len(line["cohort"]) == everybody for line in rounds):
        found = seen.result.model_sha256
        if found != undisturbed:
            yield f"nobody was set aside, and the model is {found[:12]}, expected {undisturbed[:12]}"


def all_is_charged(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """A ledger holds at least as many charges as there are releases that somebody has seen."""
    for ledger, releases in seen.released.items():
        if seen.charged[ledger] < len(releases):
            yield f"the ledger of {ledger} has {seen.charged[ledger]} charges for {len(releases)} releases"


def counted_once(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """No client is in a merge twice, no round in the log twice, and rounds follow each other."""
    for merged in seen.merged:
        names = [name for name, _ in merged.updates]
        if len(set(names)) < len(names) and "the cohort" not in names:
            yield f"round {merged.round} merged {names}"
    if seen.result is not None:
        rounds = [line["round"] for line in seen.result.rounds]
        may_miss_lines = seen.happened["disk full"] or seen.happened["write fails"]
        if rounds != list(range(1, len(rounds) + 1)) and not may_miss_lines:
            yield f"the result has rounds {rounds}"
        if len(set(rounds)) < len(rounds):
            yield f"the result has rounds {rounds}"


def own_name(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """What is merged under a client's name is what that client made."""
    for merged, name, sha in _plain(scenario, seen):
        makers = {client for client, _, _ in seen.made.get(sha, ())}
        if name not in makers:
            yield f"round {merged.round} merged under {name} what {sorted(makers) or 'nobody'} made"


def own_round(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """What is merged was made for that run and that round."""
    for merged, name, sha in _plain(scenario, seen):
        made = seen.made.get(sha, set())
        if made and (name, merged.run, merged.round) not in made:
            told = sorted({(run[:6], round) for _, run, round in made})
            yield f"round {merged.round} of run {merged.run[:6]} merged what was made for {told}"


def forgeries_refused(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """No forged message is believed, and the server's log has each that was read, with the reason."""
    for one in seen.judged:
        if not one.reason:
            yield f"{one.kind}: believed as the answer of {one.client}"
        elif one.life not in seen.killed and (one.life, one.client, one.reason) not in seen.logged:
            yield f"{one.kind}: refused as {one.reason!r}, and the log has no word of it"


def _plain(scenario: Scenario, seen: Observed) -> Iterator[tuple[Merged, str, str]]:
    """(merge, client, update's hash) where single updates are seen as they were made."""
    if scenario.job in ("secure sum", "compressed"):
        return
    for merged in seen.merged:
        for name, sha in merged.updates:
            yield merged, name, sha


def abandoned_rounds_change_nothing(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """All attempts at a round in one life of the server send the model of the merge before."""
    first: dict[tuple[int, str, int], str] = {}
    for asked in seen.asked:
        model = first.setdefault((asked.life, asked.run, asked.round), asked.model)
        if model != asked.model:
            yield f"round {asked.round}: its second attempt began with another model"
    after = {(m.life, m.run, m.round): m.after for m in seen.merged}
    for asked in seen.asked:
        expected = after.get((asked.life, asked.run, asked.round - 1))
        if expected is not None and expected != asked.model:
            yield f"round {asked.round} began with another model than round {asked.round - 1} ended with"


def whole_checkpoints(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """A checkpoint that is gone on from is one that was written, for that round."""
    for _, round, held in seen.resumed:
        if held not in seen.written.get(round, ()):
            yield f"a life went on from a checkpoint of round {round} that nobody wrote"


def lasting_checkpoints(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """No round is played again whose checkpoint was on the disk, if nobody has damaged that."""
    first: dict[int, int] = {}
    for asked in seen.asked:
        first.setdefault(asked.life, asked.round)
    for life, round in first.items():
        if round <= seen.begun[life] and not seen.happened["checkpoint damaged"]:
            yield f"round {round} was played again, the checkpoint of round {seen.begun[life]} was written"


def exact_sums(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """What a secure sum opens is the sum of the vectors of those who stayed."""
    yield from seen.sums


def recovers(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """One or two messages lost, repeated or forged, a process that dies: nobody is set aside for that."""
    faults = [fault for fault in scenario.faults if not fault.comes_too_late]
    if seen.result is None or len(faults) > 2 or not {fault.kind for fault in faults} <= RECOVERABLE:
        return
    if scenario.job == "secure sum":  # a site that is started anew has lost its secrets of the round
        return
    for line in seen.result.rounds:
        if line["set_aside"]:
            yield f"round {line['round']} set {line['set_aside']} aside"


def named_with_reason(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """Everybody in a round's cohort was trained with or is set aside by name, with a reason."""
    for line in seen.result.rounds if seen.result is not None else ():
        aside = line["set_aside"]
        if not all(reason.strip() for reason in aside.values()):
            yield f"round {line['round']} set {sorted(aside)} aside without a reason"
        if line["trained"] + len(set(aside) & set(line["cohort"])) < len(line["cohort"]):
            yield f"round {line['round']}: {line['trained']} trained, set aside {sorted(aside)}"


def bounded(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """Queues and memories stay as small as they are meant to be."""
    for what, most in MOST.items():
        if seen.most[what] > most:
            yield f"{what}: {seen.most[what]}, expected at most {most}"


def ends(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """Once nothing goes wrong any more the run ends with its result; each life ends in words."""
    yield from (f"an error as no user should see it: {crash}" for crash in seen.crashes)
    if seen.result is None and not seen.crashes:
        yield f"the run never ended: {seen.ended[-1]}"
    for words in seen.ended:
        if not words.strip() or "\n" in words:
            yield f"a life ended without saying why: {words!r}"


def nothing_leaks(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """No canary of a client's data is in anything that left its site, or in what the server wrote."""
    yield from seen.leaks
    if "canary-" in repr((seen.result, seen.lines, seen.ended)):
        yield "a canary in what the server wrote"


def refusals_hold(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """A site whose policy refuses the job has not touched its data for it."""
    if seen.refused is not None and seen.refused in seen.worked:
        yield f"{seen.refused[0]} worked for a job that it refuses"


def whole_log(scenario: Scenario, seen: Observed, undisturbed: str) -> Iterator[str]:
    """`metrics.jsonl` has no round twice, and of each round that it has what the result has."""
    if seen.result is None:
        return
    rounds = [line["round"] for line in seen.lines]
    if len(set(rounds)) < len(rounds):
        yield f"metrics.jsonl has rounds {rounds}"
    told = {line["round"]: line["model_sha256"] for line in seen.result.rounds}
    if any(told.get(line["round"]) != line["model_sha256"] for line in seen.lines):
        yield "metrics.jsonl has other models than the result"


INVARIANTS: tuple[Invariant, ...] = (
    same_bits, all_is_charged, counted_once, own_name, own_round, forgeries_refused,
    abandoned_rounds_change_nothing,
    whole_checkpoints, lasting_checkpoints, exact_sums, recovers, named_with_reason,
    bounded, ends, nothing_leaks, refusals_hold, whole_log,
)  # fmt: skip


def violations(scenario: Scenario, seen: Observed, undisturbed: str) -> list[str]:
    """A line for each thing that isn't true, with the invariant's name."""
    return [
        f"{invariant.__name__}: {line}"
        for invariant in INVARIANTS
        for line in dict.fromkeys(invariant(scenario, seen, undisturbed))
    ]
