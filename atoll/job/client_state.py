"""Checks of jobs whose strategy lets clients keep tensors between rounds: SCAFFOLD, FedDyn, MOON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.job.job import Job

WITH_CLIENT_STATE = ("scaffold", "feddyn")


def check_client_state(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if SCAFFOLD or FedDyn wouldn't be exact in this job.

    That client-level privacy and secure sums exclude them is checked in `atoll.job.privacy`.
    """
    name = job.strategy.name
    if not job.strategy.keeps_client_state:
        return
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name} corrects each local step, and what it corrects by holds gradients that no"
            f" noise protects; expected another strategy with privacy.unit = {job.privacy.unit!r}"
        )
    if job.federation.compression is not None:
        raise ValueError(
            f"federation.compression: what {name}'s clients keep and what the server adds up belong to"
            " the whole update, and a compressed one is another; expected none, found"
            f" {job.federation.compression!r}"
        )
    if job.personal.keep is not None:
        raise ValueError(
            f"personal.keep: {name}'s clients correct steps of the one model that all share; expected none,"
            f" found {job.personal.keep!r}"
        )
    if name == "scaffold":
        _check_gradients_can_be_read_off(job)


def _check_gradients_can_be_read_off(job: Job) -> None:
    """Check what SCAFFOLD's option II needs, which computes a client's mean gradient from its delta."""
    if job.train.optimizer != "sgd":
        raise ValueError(
            "train.optimizer: scaffold takes a client's mean gradient from how far its steps of SGD led;"
            f" expected 'sgd', found {job.train.optimizer!r}"
        )
    for key in ("clip_norm", "layer_decay"):
        if (value := getattr(job.train, key)) is not None:
            raise ValueError(
                f"train.{key}: scaffold takes a client's mean gradient from how far its steps led, all of one"
                f" learning rate and of whole gradients; expected none, found {value:g}"
            )
    if job.train.precision == "fp16":
        raise ValueError(
            "train.precision: 'fp16' leaves steps out, and scaffold divides by their number; expected 'fp32'"
            " or 'bf16'"
        )


def check_last_models(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if MOON doesn't work in this job."""
    name = job.strategy.name
    if not job.strategy.keeps_last_model:
        return
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name}'s updates depend on a model that clients keep, which learns without"
            f" noise; expected another strategy with privacy.unit = {job.privacy.unit!r}"
        )
    if job.tune.method == "head":
        raise ValueError(
            f"tune.method: {name} moves the representation before the head, and 'head' leaves it as it is;"
            " expected last-k, lora or full"
        )
    for key, is_set, why in (
        ("federation.error_feedback", job.feeds_errors_back,
         "a client's memory holds its last model, not what compression lost"),
        ("personal.keep", job.personal.keep is not None, "clients contrast the one model that all share"),
        ("tune.then", bool(job.tune.then), "what is tuned later isn't in clients' last models"),
        ("train.cached_states", job.train.cached_states is not None, "three models see each input"),
    ):  # fmt: skip
        if is_set:
            raise ValueError(f"{key}: with strategy.name = {name!r} {why}; leave it out")
