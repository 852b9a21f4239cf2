"""`[attack]`: simulated hostile clients, for testing how robust a strategy is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from atoll.job.section import Count, Needs, Positive, Section

if TYPE_CHECKING:
    from atoll.job.job import Job

SCALES: dict[str, float | None] = {
    "label-flip": None,
    "backdoor": 10.0,
    "sign-flip": 1.0,
    "inner-product": 10.0,
    "alie": 1.5,
    "min-max": None,
    "mimic": None,
    "gaussian": 1.0,
    "free-rider": None,
}
"""The default scale of each attack; None for attacks without a scale."""

POISONS_LABELS = ("label-flip", "backdoor")
SENDS_WHAT_IT_LEARNS = "label-flip"
"""The attack whose clients send their updates as they are, whatever these are made of."""


class AttackSection(Section):
    """`[attack]`: how many clients are hostile, and what they do.

    `scale` is the strength of the attack: the factor of the sign-flipped delta, of the negated mean
    ("inner-product") or of a backdoor's delta, the number of standard deviations for ALIE, the standard
    deviation of Gaussian noise. With a backdoor, examples of class `victim` are labelled as `target`.
    """

    kind: (
        Literal[
            "label-flip", "backdoor", "sign-flip", "inner-product", "alie", "min-max", "mimic", "gaussian",
            "free-rider",
        ]
        | None
    ) = None  # fmt: skip
    clients: Annotated[Count, Needs("kind")] = 1
    scale: Annotated[
        Positive | None, Needs("kind", tuple(kind for kind, scale in SCALES.items() if scale))
    ] = None
    victim: Annotated[str | None, Needs("kind", ("backdoor",))] = None
    target: Annotated[str | None, Needs("kind", ("backdoor",))] = None

    @property
    def factor(self) -> float:
        """The attack's scale: the job's, or the default; 1 for attacks without a scale."""
        usual = SCALES[self.kind] if self.kind else None
        return self.scale or usual or 1.0

    @model_validator(mode="after")
    def _a_backdoor_has_two_classes(self) -> AttackSection:
        for key in ("victim", "target"):
            if self.kind == "backdoor" and getattr(self, key) is None:
                raise ValueError(f"kind: 'backdoor' needs {key}, the name of a class")
        if self.kind == "backdoor" and self.victim == self.target:
            raise ValueError(f"target: expected another class than victim, found {self.target!r}")
        return self


def check_attack(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the attack doesn't work in this job."""
    kind, federation = job.attack.kind, job.federation
    if kind is None:
        return
    if job.attack.clients >= federation.clients:
        raise ValueError(
            f"attack.clients: expected fewer than federation.clients = {federation.clients}, found"
            f" {job.attack.clients}"
        )
    hides_deltas = (
        ("federation.secure_aggregation", federation.secure_aggregation),
        ("federation.compression", federation.compression is not None),
        ("privacy.where = 'distributed'", job.privacy.where == "distributed"),
    )
    for key, is_set in hides_deltas:
        if is_set and kind != SENDS_WHAT_IT_LEARNS:
            raise ValueError(
                f"attack.kind: hostile clients replace a delta as it is; expected none with {key}, or"
                f" {SENDS_WHAT_IT_LEARNS!r}"
            )
    if job.privacy.audit:
        raise ValueError(
            "attack.kind: an audit replays a run of honest clients; expected none with privacy.audit"
        )
    if kind in POISONS_LABELS and job.data.partition.kind == "resampled":
        raise ValueError(
            f"attack.kind: {kind!r} changes labels of the clients' own examples, and clients of a 'resampled'"
            " partition share theirs; expected another partition or another kind"
        )
