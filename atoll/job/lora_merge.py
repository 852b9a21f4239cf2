"""Checks of `tune.lora_merge`: which ways of merging LoRA's factors work with which other keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.job.privacy import uses_secure_aggregation

if TYPE_CHECKING:
    from atoll.job.job import Job

BY_PRODUCT = ("fedex", "flora", "flexlora")
"""Ways of merging that need each client's product of factors."""
REWRITES = ("rolora", *BY_PRODUCT)
"""Ways of merging that change, from round to round, which tensors are sent or what they mean."""


def check_lora_merge(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if `tune.lora_merge` doesn't work in this job."""
    how = job.tune.lora_merge
    if job.tune.lora_ranks is not None:
        _check_ranks(job)
    if how is None:
        return
    if job.tune.then:
        raise ValueError("tune.then: what is tuned can't change on the way with tune.lora_merge; remove one")
    if job.tune.freeze_a is not None and how != "average":
        raise ValueError(
            f"tune.freeze_a: that is lora_merge = 'ffa'; expected none, found lora_merge = {how!r}"
        )
    if how in REWRITES:
        _check_rewriting(job, how)
    if how in BY_PRODUCT:
        _check_products(job, how)


def merge_error_is_known(job: Job) -> bool:
    """Whether the server sees single clients' factors, from which it can compute the merge's error."""
    return (
        job.tune.method == "lora"
        and not job.tune.then
        and job.federation.concurrency is None
        and "client" not in job.privacy.units
        and not uses_secure_aggregation(job)
    )


def _check_rewriting(job: Job, how: str) -> None:
    strategy, keys = job.strategy, ("lr", "momentum", "beta1", "beta2", "tau", "options")
    if strategy.name not in ("fedavg", "fedprox") or any(getattr(strategy, key) is not None for key in keys):
        raise ValueError(
            f"strategy.name: tune.lora_merge = {how!r} is a mean of its own, and no server step of another"
            f" size or memory goes with it; expected 'fedavg', 'fedprox' without lr, found {strategy.name!r}"
        )
    if job.feeds_errors_back and how != "fedex":
        raise ValueError(
            "federation.error_feedback: what compression lost of a round's factors doesn't fit the next"
            f" round's with tune.lora_merge = {how!r}; expected false"
        )
    if job.personal.keep == "mixture":
        raise ValueError(
            "personal.keep: a client's own model would be of other factors than the shared one with"
            f" tune.lora_merge = {how!r}; expected 'head' or none, found 'mixture'"
        )
    if job.personal.keep == "lora-b":
        raise ValueError(
            f"personal.keep: with 'lora-b' no B reaches the server; expected none with lora_merge = {how!r}"
        )
    promise = job.privacy.promise("client")
    if how == "rolora" and promise is not None and promise.mechanism == "banded":
        raise ValueError(
            "privacy.mechanism: noise of several bands is correlated over rounds of one shape, and rolora's"
            " alternate; expected 'independent', found 'banded'"
        )


def _check_products(job: Job, how: str) -> None:
    for key, is_set in (
        ("federation.secure_aggregation", job.federation.secure_aggregation),
        ("privacy.where = 'distributed'", uses_secure_aggregation(job)),
        ("privacy.unit = 'client'", "client" in job.privacy.units),
    ):
        if is_set:
            raise ValueError(
                f"tune.lora_merge: {how!r} needs each client's product of factors, and with {key} the server"
                " has only a sum of all; expected 'ffa', 'fedsb' or 'rolora', which are exact there too"
            )


def _check_ranks(job: Job) -> None:
    tune = job.tune
    if tune.lora_merge != "flexlora":
        raise ValueError("tune.lora_ranks: ranks of clients' own need lora_merge = 'flexlora'")
    for client, rank in (tune.lora_ranks or {}).items():
        if rank > tune.default_rank:
            raise ValueError(
                f"tune.lora_ranks: {client} has {rank}, expected at most tune.rank = {tune.default_rank},"
                " which the server sends"
            )
    for key, is_set in (
        ("privacy.unit", bool(job.privacy.units)),
        ("federation.compression", job.federation.compression is not None),
        ("personal.keep", job.personal.keep is not None),
    ):
        if is_set:
            raise ValueError(
                f"tune.lora_ranks: a client's cut factors have to stay as they are cut, which {key} would"
                " undo; expected one rank for all"
            )
