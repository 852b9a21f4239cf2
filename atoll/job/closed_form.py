"""`tune.head_init`: the first round's head is computed in closed form from statistics summed over clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.job.job import Job

RIDGE = 1.0
"""The default ridge penalty on squared weights."""


def check_closed_form(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job can't have a head in closed form."""
    if job.tune.head_init is None:
        return
    if job.tune.method != "head":
        raise ValueError(
            "tune.head_init: a closed form is there for a head on a frozen backbone, found tune.method ="
            f" {job.tune.method!r}"
        )
    _check_noised(job)
    _check_kept(job)
    if job.federation.secure_aggregation:
        raise ValueError(
            "tune.head_init: the server would see each client's sums of features; expected none with"
            " federation.secure_aggregation"
        )
    if job.train.teacher is not None:
        raise ValueError("tune.head_init: a closed form knows no teacher; expected none with train.teacher")


def _check_kept(job: Job) -> None:
    """Check that the model consists of clients' sums alone, so that a client's sums can be subtracted."""
    if not job.tune.keep_sums:
        return
    if job.privacy.units:
        raise ValueError(
            f"tune.keep_sums: expected false with privacy.unit = {job.privacy.unit!r}, under which no"
            " client's sums are there without noise"
        )
    if job.federation.rounds != 1:
        raise ValueError(
            "tune.keep_sums: expected federation.rounds = 1, for a model that is trained further can't be"
            f" freed of a client's sums; found {job.federation.rounds}"
        )


def _check_noised(job: Job) -> None:
    """Check that under privacy the sums are a single release for each unit, with noise that fits them."""
    privacy, norm = job.privacy, job.tune.feature_norm
    if privacy.unit == "none":
        if norm is not None:
            raise ValueError(
                "tune.feature_norm has no meaning with privacy.unit = 'none', where the sums are of features"
                " as they are: remove it"
            )
        return
    if norm is None:
        raise ValueError(
            "tune.feature_norm: missing, expected the norm that an example's features are clipped to with"
            f" privacy.unit = {privacy.unit!r}, such as 1.0"
        )
    for key, value, fits, expected in (
        ("privacy.unit", privacy.unit, privacy.unit != "both", "'example' or 'client'"),
        ("privacy.where", privacy.where, privacy.where != "distributed",
         f"'{'server' if privacy.unit == 'client' else 'client'}'"),
        ("privacy.clipping", privacy.clipping, privacy.clipping == "fixed", "'fixed'"),
        ("privacy.mechanism", privacy.mechanism, privacy.mechanism == "independent", "'independent'"),
        ("privacy.audit", privacy.audit, not privacy.audit, "false"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{key}: expected {expected} with tune.head_init, found {value!r}")
    if privacy.unit == "example":
        _check_single_release(job)


def _check_single_release(job: Job) -> None:
    """Check that each example is in the sums exactly once: no sampling, and no noised steps afterwards."""
    if job.federation.rounds != 1:
        raise ValueError(
            "federation.rounds: expected 1 with tune.head_init and privacy.unit = 'example', whose one"
            f" release are the sums; found {job.federation.rounds}"
        )
    for key in ("sampling_rate", "steps", "clipping_norm"):
        if job.privacy.is_given(key):
            raise ValueError(
                f"privacy.{key} has no meaning with tune.head_init and privacy.unit = 'example', where every"
                " example is in the sums once, clipped to tune.feature_norm: remove it"
            )


def is_closed_form_round(job: Job, round: int) -> bool:
    """Whether this round's head is computed from statistics, without training."""
    return job.tune.head_init is not None and round == 1


def is_the_only_release(job: Job) -> bool:
    """Whether the sums of the closed form are the only release under example-level privacy."""
    return job.tune.head_init is not None and job.privacy.unit == "example"


def statistics_shapes(job: Job, classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the statistics, all float64: examples per class, features' sums, second moments."""
    squares = {"squares": (width,)} if job.tune.head_init == "prototype" else {"gram": (width, width)}
    return {"counts": (classes,), "sums": (classes, width), **squares}
