"""`[attack]`: clients that are hostile on purpose, to try a strategy against. Simulations only."""

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
"""Each attack's scale where the job gives none; None where it has none."""

POISONS_LABELS = ("label-flip", "backdoor")


class AttackSection(Section):
    """`[attack]`: what the hostile ones among the clients do.

    `scale` multiplies what they send: the sign-flipped delta, the mean against all others', deviations for
    ALIE, the standard deviation of noise, the boosted delta of a backdoor. `victim` and `target` are a
    backdoor's: examples of the one class are learnt as the other.
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
        """The scale that is meant; 1 where the attack has none."""
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
    """Raises ValueError, in one line that names the key, where such clients would not do what is asked."""
    kind, federation = job.attack.kind, job.federation
    if kind is None:
        return
    if job.attack.clients >= federation.clients:
        raise ValueError(
            f"attack.clients: expected fewer than federation.clients = {federation.clients}, found"
            f" {job.attack.clients}"
        )
    for key, is_set in (
        ("federation.secure_aggregation", federation.secure_aggregation),
        ("federation.compression", federation.compression is not None),
        ("privacy.where = 'distributed'", job.privacy.where == "distributed"),
        ("privacy.audit", job.privacy.audit),
    ):
        if is_set:
            raise ValueError(
                f"attack.kind: hostile clients replace a delta as it is; expected none with {key}"
            )
    if kind in POISONS_LABELS and job.data.partition.kind == "resampled":
        raise ValueError(
            f"attack.kind: {kind!r} changes labels of the clients' own examples, and clients of a 'resampled'"
            " partition share theirs; expected another partition or another kind"
        )
