"""Bugs planted in the real code; `python -m tests.fault_simulation.planted` says how many seeds find each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

import atoll.client.app as client_app
import atoll.client.site as site
import atoll.client.state.store as store
import atoll.kit.signed_replies as signed_replies
import atoll.server.app as server_app
import atoll.server.received as received
import atoll.server.rounds.aggregation as aggregation
import atoll.server.rounds.secure_aggregation as secure_aggregation
import atoll.server.rounds.start as start
import atoll.server.rounds.validation as validation
import atoll.server.run.checkpoint as checkpoint
import atoll.server.run.run_job as run_job
import atoll.system.chained_log as chained_log
import atoll.system.durable_files as durable_files
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.kit.roster import is_signature
from atoll.kit.signed_replies import SignatureCheck, signed_content
from atoll.privacy.ledger import Ledger
from atoll.protocol.flower_content import unpacked
from atoll.protocol.messages import Hello, decode_reply
from atoll.server.app import FlowerTransport
from atoll.server.rounds.central_dp import CentralDp
from atoll.server.rounds.validation import Validation
from atoll.server.run.directory import RunDirectory
from tests.fault_simulation.faults import Scenario
from tests.fault_simulation.hooks import simulated
from tests.fault_simulation.play import play

MOST_SEEDS = 2000

Plant = Callable[[], AbstractContextManager[Any]]


def wrapped(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """Replace an attribute by what `make` makes of it."""
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def replaced(owner: Any, name: str, value: Any) -> Plant:
    return lambda: patch.object(owner, name, value)


def all_of(*plants: Plant) -> Plant:
    @contextmanager
    def planted() -> Iterator[None]:
        with contextmanager_of(plants):
            yield

    return planted


@contextmanager
def contextmanager_of(plants: tuple[Plant, ...]) -> Iterator[None]:
    if not plants:
        yield
        return
    with plants[0](), contextmanager_of(plants[1:]):
        yield


def without_sync(original: Any) -> Any:
    return lambda *arguments, durable=True, **named: original(*arguments, durable=False, **named)


def charged_when_the_next_round_begins(original: Any) -> Any:
    late: dict[int, Any] = {}

    def charge(self: Any, round: int, cost: Any) -> None:
        if before := late.pop(id(self), None):
            original(self, *before)
        late[id(self)] = (round, cost)

    return charge


def charge_passed_over(original: Any) -> Any:
    def charge(self: Any, entry: Any) -> None:
        try:
            original(self, entry)
        except OSError:
            self._count(entry)

    return charge


def charged_once_a_round(original: Any) -> Any:
    def charge(self: Any, client: str, fingerprint: str, job: Any, dp_plan: Any, request: Any) -> int:
        if self.ledger(client, dp_plan.unit).has(request.run, request.round):
            return int(request.round)
        return int(original(self, client, fingerprint, job, dp_plan, request))

    return charge


def any_round(original: Any) -> Any:
    def fault(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        return None if found and found.startswith("reply to round") else found

    return fault


def with_strangers(original: Any) -> Any:
    def replies(self: Any) -> Iterator[Any]:
        yield from original(self)
        heads, bodies = unpacked(self.content)
        for name in heads.keys() - set(self.names):
            yield decode_reply(heads[name], bodies[name])

    return replies


def first_reply_counts_twice(original: Any) -> Any:
    last: dict[int, Any] = {}

    def gather(self: Any, run: Any, names: Any, round: int, attempt: int) -> Any:
        found = original(self, run, names, round, attempt)
        kept = last.pop(id(run), ()) if attempt > 1 else ()
        last[id(run)] = tuple(found.updates)
        return dataclasses.replace(found, updates=(*kept, *found.updates))

    return gather


def merged_below_quorum(original: Any) -> Any:
    def warn(run: Any, gathered: Any, round: int) -> None:
        clients = len(run.setup.population)
        if gathered.updates and gathered.num_valid < run.setup.job.federation.quorum * clients:
            aggregation.merge_updates(run, gathered.updates, round)
        original(run, gathered, round)

    return warn


def from_round(shift: int) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def continue_from(run: Any, found: Any) -> None:
            original(run, found)
            run.state.round = max(0, run.state.round + shift)

        return continue_from

    return make


def reasons(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def validate(*arguments: Any, **named: Any) -> Any:
            found = original(*arguments, **named)
            return dataclasses.replace(found, set_aside=change(found.set_aside))

        return validate

    return make


def hash_of_names(original: Any) -> Any:
    class Names:
        @staticmethod
        def sha256(content: bytes) -> Any:
            return original.sha256(content.split(b"\0")[1] if b"\0" in content else content)

    return Names


def asked_once(original: Any) -> Any:
    def converse(*given: Any, **how: Any) -> Any:
        with patch.multiple("atoll.server.resending", RESEND_PART=9.0, HELLO_AGAIN_SECONDS=1e9):
            yield from original(*given, **how)

    return converse


def claims_believed(original: Any) -> Any:
    """A signature need only fit what the message itself says that it answers."""

    def fault(self: Any, seal: Any, client: str, sha256: bytes) -> str:
        claimed = seal and signed_replies.Exchange(seal.run, seal.round, seal.nonce)
        return str(
            original(dataclasses.replace(self, expected=claimed or self.expected), seal, client, sha256)
        )

    return fault


def signed_without_its_number(original: Any) -> Any:
    return lambda exchange, *rest: original(dataclasses.replace(exchange, nonce=""), *rest)


def key_of_any_site(original: Any) -> Any:
    def fault(self: Any, seal: Any, client: str, sha256: bytes) -> str:
        content, made = signed_content(self.expected, client, sha256), seal.signatures[client]
        keys = self.roster.keys.values()
        return "" if any(is_signature(key, content, made) for key in keys) else "signed by no site"

    return fault


def taken_without_seal(original: Any) -> Any:
    return lambda self, seal, *rest: original(self, seal, *rest) if seal is not None else ""


PLANTED: dict[str, Plant] = {
    "the server's ledger is charged a round late": wrapped(
        CentralDp, "_charge", charged_when_the_next_round_begins
    ),
    "a charge that the disk refuses is passed over": wrapped(Ledger, "charge", charge_passed_over),
    "a round that is trained again is not charged again": wrapped(
        PrivacyLedgers, "charge", charged_once_a_round
    ),
    "lines of ledgers are not synced": wrapped(chained_log, "append_synced", without_sync),
    "a half line of a ledger stays": replaced(chained_log, "cut_synced", lambda path, length: None),
    "files are renamed before they are synced": wrapped(durable_files, "write_synced", without_sync),
    "folders are not synced": replaced(durable_files, "sync_folder", lambda folder: None),
    "files are written in their place": all_of(
        replaced(durable_files, "temporary_of", lambda path: path),
        replaced(checkpoint, "temporary_of", lambda path: path),
    ),
    "a damaged checkpoint is read": replaced(checkpoint, "tensors_sha256", lambda tensors: ""),
    "checkpoints are never let go": replaced(checkpoint, "KEEP", 1000),
    "clients' states are never let go": replaced(store, "ROUNDS_KEPT", 1000),
    "a resumed run leaves a round out": wrapped(start, "_continue_from", from_round(1)),
    "a resumed run plays a round twice": wrapped(start, "_continue_from", from_round(-1)),
    "a round that is trained again begins with what it left": wrapped(
        ClientStateStore,
        "load_before",
        lambda original: lambda self, run, client, round: original(self, run, client, round + 1),
    ),
    "clients' states are not synced": wrapped(store, "replace_all", without_sync),
    "a reply of any round is taken": wrapped(validation, "_fault", any_round),
    "a reply may say whose it is": wrapped(
        received.Replies,
        "_reply",
        lambda original: lambda self, name, head, body: decode_reply(head, body),
    ),
    "who was not asked may reply": wrapped(received.Replies, "__iter__", with_strangers),
    "updates of an abandoned attempt count again": wrapped(
        aggregation.PlainRound, "gather_updates", first_reply_counts_twice
    ),
    "an abandoned round is merged": wrapped(aggregation, "_warn_of_set_aside", merged_below_quorum),
    "a site works for what it refused": wrapped(
        Site,
        "_policy_violation",
        lambda original: lambda self, job, kind: original(self, job, kind) if kind is Hello else "",
    ),
    "the server is told what is wrong with the data": replaced(
        site, "redact", lambda error, known: str(error)
    ),
    "nobody says why a client is set aside": wrapped(
        Validation, "__call__", reasons(lambda aside: dict.fromkeys(aside, ""))
    ),
    "who sends nothing is not named": wrapped(
        Validation,
        "__call__",
        reasons(lambda aside: {n: r for n, r in aside.items() if not r.startswith("no reply")}),
    ),
    "a site's last reply is taken for any request": wrapped(client_app, "hashlib", hash_of_names),
    "what is lost is not sent again": wrapped(FlowerTransport, "_converse", asked_once),
    "masks of those who left stay in the sum": wrapped(
        secure_aggregation,
        "unmask_sum",
        lambda original: lambda keys, dealers, masked, *rest: original(keys, list(masked), masked, *rest),
    ),
    "a log that is begun anew keeps its lines": wrapped(
        RunDirectory,
        "truncate_log",
        lambda original: lambda self, round: original(self, round) if round else [],
    ),
    "the log is not on the disk before its checkpoint": replaced(checkpoint, "sync_file", lambda path: None),
    "an error of the disk ends the run as it is": replaced(
        run_job, "disk_errors_as_job_errors", lambda out: nullcontext()
    ),
    "names of clients are read as they come": replaced(client_app, "_names", json.loads),
    "signatures are not looked at": replaced(SignatureCheck, "_signature_fault", lambda *given: ""),
    "an answer with no seal needs none": wrapped(SignatureCheck, "fault", taken_without_seal),
    "a seal is believed which request it answers": wrapped(SignatureCheck, "fault", claims_believed),
    "a signature is not over the request's number": wrapped(
        signed_replies, "signed_content", signed_without_its_number
    ),
    "any site's key will do for a client": wrapped(SignatureCheck, "_signature_fault", key_of_any_site),
    "a site is not asked again for what it has not signed": replaced(received, "MOST_UNSIGNED", 1),
    "greetings are not checked": wrapped(
        server_app,
        "greetings",
        lambda original: lambda content, site, job, check: original(content, site, job),
    ),
}


JOBS: dict[str, tuple[str, ...]] = {
    "the server's ledger is charged a round late": ("client privacy",),
    "a charge that the disk refuses is passed over": ("client privacy", "example privacy"),
    "a round that is trained again is not charged again": ("example privacy",),
    "lines of ledgers are not synced": ("client privacy", "example privacy"),
    "clients' states are never let go": ("scaffold", "compressed"),
    "a round that is trained again begins with what it left": ("scaffold", "compressed"),
    "clients' states are not synced": ("scaffold", "compressed"),
    "updates of an abandoned attempt count again": ("fedavg", "fedadam", "scaffold"),
    "masks of those who left stay in the sum": ("secure sum",),
}
"""The kinds of jobs whose code a bug is in: seeds of others count, and need not be played."""


OUT_OF_DATE = ("AttributeError", "ImportError", "NameError", "TypeError")
"""Errors of a bug that no longer fits the code: it breaks, and hides from nobody."""


def seeds_until_found(name: str, most: int = MOST_SEEDS) -> tuple[int | None, str]:
    """(how many seeds it took, the first violation); None where none of them found it.

    Raises:
        AssertionError: the planted bug broke, since the code that it is planted in is another by now.
    """
    for seed in range(most):
        scenario = Scenario.of(seed)
        if scenario.job not in JOBS.get(name, (scenario.job,)):
            continue
        outcome = play(scenario, PLANTED[name]())
        broken = [line for line in outcome.violations if any(error in line for error in OUT_OF_DATE)]
        assert not broken, f"{name}: {broken[0]}"
        if outcome.violations:
            return seed + 1, outcome.violations[0]
    return None, ""


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    missed = 0
    with simulated():
        for name in PLANTED:
            if names and not any(part in name for part in names):
                continue
            seeds, line = seeds_until_found(name)
            missed += seeds is None
            sys.stdout.write(f"{'not found' if seeds is None else seeds:>9}  {name}: {line[:100]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{missed} not found within {MOST_SEEDS} seeds\n")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
