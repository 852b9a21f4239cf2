"""The requests of a server to its clients: one frozen class for each kind of work, and their encoding.

Request
├── StatisticsRequest        sums over features, for a head in closed form
├── ModelRequest             with the model's tensors
│   ├── EvaluateRequest          measure them
│   └── TrainingRequest          train from them, and send
│       ├── TrainRequest             the update
│       ├── MaskedSumRequest         a contribution under masks, for a secure sum
│       └── UnmaskedSumRequest       the same without masks: in simulations, where masks would cancel
└── SumRequest               one stage of one try at a secure sum
    ├── KeysRequest              1: public keys
    ├── SharesRequest            2: shares of the secrets, for the owners of these keys
    ├── MaskedSumRequest         3
    └── RevealRequest            4: the shares that open the sum of those who stayed
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

from atoll.protocol.fields import PER_CLIENT, SHARED, decode, encode
from atoll.protocol.messages import DataInfo
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class Request:
    """A request for work; every kind has the job, round and run to which it belongs.

    `job` is the job's canonical JSON, `round` counts from 1, `data_info` is what all clients agreed on. `run`
    identifies the run in ledgers: unchanged when it is resumed, another for the job's next run.
    """

    job: str
    job_hash: str
    round: int
    data_info: DataInfo
    run: str = field(default="", kw_only=True)


class RequestOrigin(TypedDict):
    """The fields that all requests of a round share."""

    job: str
    job_hash: str
    round: int
    data_info: DataInfo
    run: str


def origin_of(request: Request) -> RequestOrigin:
    """The shared fields of a request, to build another one of the same round."""
    return RequestOrigin(
        job=request.job, job_hash=request.job_hash, round=request.round, data_info=request.data_info,
        run=request.run,
    )  # fmt: skip


@dataclass(frozen=True)
class ModelRequest(Request):
    """A request that sends the model's trainable tensors, by name."""

    tensors: Tensors = field(metadata=SHARED)


@dataclass(frozen=True)
class EvaluateRequest(ModelRequest):
    """Evaluate the tensors on each client's validation split.

    Each client first takes `adapt_steps` local steps from them. Where clients keep tensors for themselves,
    these replace the shared ones, except with `of_shared_model`.
    """

    adapt_steps: int = field(default=0, kw_only=True)
    of_shared_model: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class StatisticsRequest(Request):
    """Send sums over the features of the training part, from which the server computes a head."""


@dataclass(frozen=True)
class TrainingRequest(ModelRequest):
    """Train from the tensors; `plan` has the strategy's numbers for the round, such as `proximal_mu`."""

    plan: Mapping[str, float] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class TrainRequest(TrainingRequest):
    """Train from the tensors, and send the update.

    `strategy_tensors` are the tensors that the strategy sends beside the model, such as SCAFFOLD's c.
    """

    strategy_tensors: Tensors = field(default_factory=dict, kw_only=True, metadata=SHARED)


@dataclass(frozen=True)
class SumRequest(Request):
    """A stage of a secure sum: the `attempt` at the round, from 1, and how many clients can open the sum."""

    attempt: int = field(kw_only=True)
    threshold: int = field(kw_only=True)


@dataclass(frozen=True)
class KeysRequest(SumRequest):
    """Send two new public keys."""


@dataclass(frozen=True)
class SharesRequest(SumRequest):
    """Share the secrets among the owners of these public keys, encrypted for each."""

    public_keys: Tensors = field(kw_only=True, metadata=SHARED)


@dataclass(frozen=True)
class MaskedSumRequest(TrainingRequest, SumRequest):
    """Train, and send the contribution under masks; `shares` are those that others dealt to each client."""

    shares: Mapping[str, Tensors] = field(kw_only=True, metadata=PER_CLIENT)


@dataclass(frozen=True)
class UnmaskedSumRequest(TrainingRequest, SumRequest):
    """Train, and send the contribution without masks. A real site refuses."""


@dataclass(frozen=True)
class ConfirmRequest(SumRequest):
    """Sign the list of the clients whose vectors arrived."""

    survivors: tuple[str, ...] = field(kw_only=True)


@dataclass(frozen=True)
class RevealRequest(ConfirmRequest):
    """Send the shares that open the sum of the remaining clients; `signatures` are theirs of the list."""

    signatures: Tensors = field(kw_only=True, metadata=SHARED)


KINDS: Mapping[str, type[Request]] = {
    kind.__name__: kind
    for kind in (
        EvaluateRequest, StatisticsRequest, TrainRequest, KeysRequest, SharesRequest, MaskedSumRequest,
        UnmaskedSumRequest, ConfirmRequest, RevealRequest,
    )
}  # fmt: skip


def encode_request(request: Request, names: Sequence[str] = ()) -> tuple[str, bytes]:
    """The request as (JSON head, safetensors body); parts for single clients only for those in `names`."""
    return encode(request, names)


def decode_request(head: str, body: bytes) -> Request:
    """The request that `encode_request` wrote.

    Raises:
        DataError: the message has another version or kind, or is malformed.
    """
    return decode(KINDS, "request", head, body)


def work_name(request: Request) -> str:
    """The kind of request in a word or two, as for logs: `train`, `masked sum`."""
    spaced = re.sub(r"(?<!^)(?=[A-Z])", " ", type(request).__name__.removesuffix("Request"))
    return spaced.lower()


def has_parts_per_client(request: Request) -> bool:
    """Whether the request's body differs between clients."""
    return any(one.metadata == PER_CLIENT for one in fields(request))
