"""A round in which the server sees no update, only their secure sum, if enough clients stay to open it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from atoll.job.job import Job
from atoll.job.privacy import charges_clients
from atoll.job.train import lr_of_round
from atoll.kit.roster import SIGNATURE_BYTES
from atoll.privacy.dp_plan import distributed_terms
from atoll.privacy.noise import entropy
from atoll.privacy.secagg import (
    KEY_BYTES,
    SEALED_BYTES,
    SHARE_BYTES,
    SecureAggregationFailed,
    Vector,
    Verifier,
    is_signed,
    keys_fault,
    least_threshold,
    sum_of,
    unmask_sum,
)
from atoll.privacy.secagg_encoding import (
    EXTRA,
    FixedPointCodec,
    as_bytes,
    as_tensor,
    context_of,
    length,
    unflatten,
)
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Reply, SecureMessage, Update
from atoll.protocol.requests import (
    ConfirmRequest,
    KeysRequest,
    MaskedSumRequest,
    RequestOrigin,
    RevealRequest,
    SharesRequest,
    SumRequest,
    TrainRequest,
    UnmaskedSumRequest,
    origin_of,
)
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.validation import STATES, ValidatedUpdates, state_fault

Ask = Callable[[SumRequest, Sequence[str]], Sequence[Reply]]
"""Sends a request to clients and waits for their replies."""


class SumOrigin(RequestOrigin):
    """The fields that all requests of one attempt at a secure sum share."""

    attempt: int
    threshold: int


@dataclass
class SecureRound:
    """One attempt at a round by secure sum.

    `train` is the training request with the model and the plan; `aside` has the reason for each client that
    was set aside. `summed` are the tensors that clients train, which give a contribution's length.
    """

    job: Job
    train: TrainRequest
    attempt: int
    cohort: Sequence[str]
    masks: bool
    ask: Ask
    verifier: Verifier | None = None
    summed: Tensors = field(kw_only=True)
    aside: dict[str, str] = field(default_factory=dict)
    charged_rounds: int = 0

    def screened(self) -> ValidatedUpdates:
        """The sum as one update that stands for all its clients; no update where too few stayed."""
        try:
            total, stayed = self._opened() if self.masks else self._sum_unmasked()
        except SecureAggregationFailed as error:
            aside = {**self.aside, "the sum": str(error)}
            return ValidatedUpdates((), aside, charged_rounds=self.charged_rounds)
        return ValidatedUpdates((self._as_update(total),), dict(sorted(self.aside.items())), stayed)

    @property
    def threshold(self) -> int:
        """How many clients must stay for the sum to be opened; it is public before the round begins."""
        return threshold_of(self.job, len(self.cohort))

    def _opened(self) -> tuple[Vector, int]:
        """(the sum, the number of clients in it), by the protocol's five stages.

        A client that sends anything malformed is set aside.
        """
        of_sum = self._of_sum
        request: SumRequest = KeysRequest(**of_sum)
        context = context_of(request)
        keys = self._keys(self._stage(request, self.cohort), context)
        public = {name: as_tensor(advertised) for name, advertised in keys.items()}
        dealt = self._dealt(self._stage(SharesRequest(**of_sum, public_keys=public), sorted(keys)), keys)
        shares = {
            name: {other: content[name] for other, content in dealt.items() if other != name}
            for name in dealt
        }
        request = MaskedSumRequest(**of_sum, tensors=self.train.tensors, plan=self.train.plan, shares=shares)
        masked = self._vectors(self._stage(request, sorted(dealt)))
        self._check(len(masked))
        survivors = tuple(sorted(masked))
        confirmed = self._stage(ConfirmRequest(**of_sum, survivors=survivors), survivors)
        signatures = {n: c["signature"] for n, c in confirmed.items() if self._has(n, c, "signature", None)}
        self._check(len(signatures))
        request = RevealRequest(**of_sum, survivors=survivors, signatures=signatures)
        revealed = self._revealed(self._stage(request, survivors), dealt)
        return unmask_sum(keys, list(dealt), masked, revealed, self.threshold, context), len(masked)

    def _keys(self, sent: Mapping[str, Tensors], context: bytes) -> dict[str, bytes]:
        """The clients' advertisements whose keys are valid, used by nobody else and signed by their sites."""
        keys = {
            name: as_bytes(content["keys"])
            for name, content in sent.items()
            if self._has(name, content, "keys", (KEY_BYTES, KEY_BYTES + SIGNATURE_BYTES))
        }
        times = Counter(keys.values())

        def fault_of(name: str, advertised: bytes) -> str | None:
            if times[advertised] > 1:
                return "another client sent the same keys"
            if self.verifier is not None and not is_signed(self.verifier, context, name, advertised):
                return "its keys are not signed by its site"
            return keys_fault(advertised)

        faults = {name: fault_of(name, advertised) for name, advertised in keys.items()}
        self.aside |= {name: fault for name, fault in faults.items() if fault is not None}
        good = {name: keys[name] for name, fault in faults.items() if fault is None}
        self._check(len(good))
        return good

    def _dealt(self, sent: Mapping[str, Tensors], keys: Mapping[str, bytes]) -> dict[str, Tensors]:
        """The encrypted shares of the clients that sent one for each other client."""
        good: dict[str, Tensors] = {}
        for name, content in sent.items():
            if content.keys() != keys.keys() - {name}:
                self.aside[name] = "it did not deal a share to each of the others"
            elif all(self._has(name, content, other, (SEALED_BYTES,)) for other in content):
                good[name] = content
        self._check(len(good))
        return good

    def _revealed(
        self, sent: Mapping[str, Tensors], dealt: Mapping[str, Tensors]
    ) -> dict[str, dict[str, bytes]]:
        """The revealed shares of the clients that revealed one for each client in `dealt`."""
        good: dict[str, dict[str, bytes]] = {}
        for name, content in sent.items():
            if content.keys() != dealt.keys():
                self.aside[name] = "it did not reveal a share of each of the others"
            elif all(self._has(name, content, other, (1 + SHARE_BYTES,)) for other in content):
                good[name] = {other: as_bytes(share) for other, share in content.items()}
        return good

    def _has(self, name: str, content: Tensors, part: str, lengths: Sequence[int] | None) -> bool:
        """Whether the content has that part with a valid number of bytes; its client is set aside if not."""
        part_bytes = content.get(part, torch.empty(0))
        if (part_bytes.dtype, part_bytes.dim()) == (torch.uint8, 1) and (
            lengths is None or len(part_bytes) in lengths
        ):
            return True
        self.aside[name] = "a part of its message has a wrong form"
        return False

    def _sum_unmasked(self) -> tuple[Vector, int]:
        """(the sum, the number of clients) without masks, as in simulations: masks would cancel exactly."""
        request = UnmaskedSumRequest(**self._of_sum, tensors=self.train.tensors, plan=self.train.plan)
        vectors = self._vectors(self._stage(request, self.cohort))
        self._check(len(vectors))
        return sum_of(vectors.values()), len(vectors)

    @property
    def _of_sum(self) -> SumOrigin:
        return SumOrigin(**origin_of(self.train), attempt=self.attempt, threshold=self.threshold)

    def _stage(self, request: SumRequest, names: Sequence[str]) -> dict[str, Tensors]:
        """The named clients' answers, by name; clients that do not answer are set aside."""
        answers: dict[str, Tensors] = {}
        for reply in self.ask(request, names):
            if isinstance(reply, SecureMessage) and reply.client in names and reply.round == request.round:
                answers[reply.client] = reply.content
            elif isinstance(reply, Failure) and reply.client in names:
                self.aside[reply.client] = reply.reason
        for name in names:
            if name not in answers:
                self.aside.setdefault(name, "no reply before the deadline")
        return answers

    def _vectors(self, sent: Mapping[str, Tensors]) -> dict[str, Vector]:
        """The vectors of the right length and dtype, by client; clients with other ones are set aside."""
        numbers = length(self.summed, private=distributed_terms(self.job) is not None)
        good: dict[str, Vector] = {}
        is_charged = charges_clients(self.job)
        for name, content in sent.items():
            vector = content.get("vector")
            if vector is None or vector.dtype != torch.int64 or vector.shape != (numbers,):
                self.aside[name] = f"its vector is not of {numbers} whole numbers"
                continue
            if is_charged:
                charged = content.get(CHARGED_ROUNDS)
                if charged is None or state_fault(CHARGED_ROUNDS, charged) is not None:
                    self.aside[name] = "it does not tell how many rounds its ledger was charged"
                    continue
                self.charged_rounds = max(self.charged_rounds, int(charged))
            good[name] = vector.numpy().view(np.uint64)
        return good

    def _check(self, left: int) -> None:
        if left < self.threshold:
            raise SecureAggregationFailed(f"{left} clients are left, needed {self.threshold}")

    def _as_update(self, total: Vector) -> Update:
        model, dp_plan = self.summed, distributed_terms(self.job)
        numbers = length(model, private=dp_plan is not None)
        values = FixedPointCodec.of(dp_plan, numbers, self.threshold, entropy).values(total)
        states = {name: torch.zeros((), dtype=torch.float64) for name in STATES}
        if charges_clients(self.job):  # also where each client's examples have noise of their own
            states[CHARGED_ROUNDS] = torch.tensor(float(self.charged_rounds), dtype=torch.float64)
        if dp_plan is None:
            weight, *loss_states = values[-len(EXTRA) :]
            states |= dict(zip(EXTRA[1:], loss_states, strict=True))
            return Update(
                "the cohort", self.train.round, unflatten(values[: -len(EXTRA)] / weight, model), 1, states
            )
        mean = unflatten(values * scale_of_sum(self.job, self.train.round), model)
        return Update("the cohort", self.train.round, mean, 1, states)


def scale_of_sum(job: Job, round: int) -> float:
    """The factor from a secure sum of clipped contributions to a step; it follows from the job alone."""
    dp_plan = distributed_terms(job)
    assert dp_plan is not None
    step = -lr_of_round(job.train, round, job.federation.rounds) if dp_plan.unit == "example" else 1.0
    return step / dp_plan.divisor


def threshold_of(job: Job, cohort: int) -> int:
    """How many clients must stay: more than two thirds of the cohort, or the job's larger part of it."""
    fraction = job.federation.secure_threshold
    least = least_threshold(cohort)
    return least if fraction is None else max(least, -int(-fraction * cohort // 1))
