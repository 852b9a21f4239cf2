"""A site's part in secure sums: keys and shares, and the masked vectors of its clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from atoll.job.federation import FederationSection
from atoll.job.job import Job
from atoll.privacy.dp_plan import DpPlan, distributed_terms
from atoll.privacy.noise import RandomBits, entropy, seeded
from atoll.privacy.secagg import Identity, Participant, SecureAggregationFailed
from atoll.privacy.secagg_encoding import (
    FixedPointCodec,
    OutOfRange,
    as_bytes,
    as_tensor,
    clipped,
    context_of,
    flat,
    length,
    weighted,
)
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Reply, SecureMessage, Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.requests import (
    ConfirmRequest,
    KeysRequest,
    MaskedSumRequest,
    RevealRequest,
    SharesRequest,
    SumRequest,
    UnmaskedSumRequest,
)
from atoll.protocol.tensors import Tensors


@dataclass
class SecureAggregationSession:
    """The secure sums in progress, one for each client of this process.

    A real site has an `identity`, which signs for its clients and verifies those of other sites.
    """

    participants: dict[str, Participant] = field(default_factory=dict)
    identity: Identity | None = None

    def answer(self, request: SumRequest, names: Sequence[str]) -> Iterator[Reply]:
        """The named clients' keys, encrypted shares, confirmations or revealed shares."""
        for name in names:
            try:
                yield SecureMessage(name, request.round, self._stage(request, name))
            except SecureAggregationFailed as error:
                yield Failure(name, str(error))

    def _stage(self, request: SumRequest, name: str) -> Tensors:
        match request:
            case KeysRequest():
                return {"keys": as_tensor(self._person(request, name, is_new=True).advertise())}
            case SharesRequest():
                keys = {other: as_bytes(t) for other, t in request.public_keys.items()}
                dealt = self._person(request, name).deal(keys, request.threshold)
                return {other: as_tensor(content) for other, content in dealt.items()}
            case RevealRequest():
                signatures = {other: as_bytes(t) for other, t in request.signatures.items()}
                revealed = self._person(request, name).reveal(request.survivors, signatures)
                return {other: as_tensor(share) for other, share in revealed.items()}
            case ConfirmRequest():
                return {"signature": as_tensor(self._person(request, name).confirm(request.survivors))}
        raise TypeError(f"no stage without data: {type(request).__name__}")

    def _person(self, request: SumRequest, name: str, *, is_new: bool = False) -> Participant:
        context = context_of(request)
        known = self.participants.get(name)
        if is_new and (known is None or known.context != context):
            cohort = cohort_of(Job.from_json(request.job))
            known = self.participants[name] = Participant(name, context, self.identity, cohort)
        if known is None or known.context != context:
            raise SecureAggregationFailed("its site was started anew in the middle of the round")
        return known

    def encode_contributions(
        self,
        job: Job,
        request: MaskedSumRequest | UnmaskedSumRequest,
        values: Iterable[tuple[str, torch.Tensor]],
        charged: Mapping[str, int],
    ) -> Iterator[Reply]:
        """Contributions as integers with each client's share of the noise, masked if the request asks for it.

        `values` are (client, its contribution [numbers]). A client's share of the noise depends on the
        threshold with which it dealt its secret shares, whatever the request says now. `charged` has each
        client's number of charged rounds.
        """
        dp_plan = distributed_terms(job)
        numbers = length(request.tensors, private=dp_plan is not None)
        for name, contribution in values:
            random_bits = share_random_bits(job, request.round, name)
            try:
                is_masked = isinstance(request, MaskedSumRequest)
                person = self._person(request, name) if is_masked else None
                if person is not None:
                    person.check_dealt()
                threshold = request.threshold if person is None else person.threshold
                vector = FixedPointCodec.of(dp_plan, numbers, threshold, random_bits).integers(
                    contribution.numpy()
                )
                if isinstance(request, MaskedSumRequest) and person is not None:
                    dealt = {other: as_bytes(t) for other, t in request.shares.get(name, {}).items()}
                    vector = person.masked(dealt, vector)
            except (OutOfRange, SecureAggregationFailed) as error:
                yield Failure(name, str(error))
                continue
            rounds = torch.tensor(float(charged.get(name, 0)), dtype=torch.float64)
            content = {"vector": torch.from_numpy(vector.view(np.int64)), CHARGED_ROUNDS: rounds}
            yield SecureMessage(name, request.round, content)


def cohort_of(job: Job) -> int:
    """How many clients a round asks; the cohort of a secure sum has a fixed size."""
    return job.federation.cohort or job.federation.clients


def contributions(
    updates: Iterable[Update], dp_plan: DpPlan | None, federation: FederationSection
) -> Iterator[tuple[str, torch.Tensor]]:
    """(client, its update as a vector [numbers]): clipped under client-level privacy, otherwise weighted."""
    for update in updates:
        if dp_plan is None:
            weight = federation.merge_weight(update.num_examples)
            yield update.client, weighted(replace(update, num_examples=weight))
        else:
            yield update.client, clipped(flat(update.delta), dp_plan.promise.clipping_norm)


def sums(by_client: Iterable[tuple[str, Tensors]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(client, its sum of clipped gradients as a vector [numbers])."""
    return ((name, flat(tensors)) for name, tensors in by_client)


def share_random_bits(job: Job, round: int, client: str) -> RandomBits:
    """The source of a client's share of the noise: the system's entropy, or a seed in simulations."""
    if job.privacy.seeded_noise:
        return seeded(stream_seed(job.seed, "share", round, client))
    return entropy
