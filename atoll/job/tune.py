"""`[tune]`: which tensors are trained and travel, and how that changes on the way."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import model_validator

from atoll.job.section import Count, Needs, Positive, Section

OF_LORA = Needs("method", ("lora",))


class Tuned(Section):
    """Which tensors are trained and travel."""

    method: Literal["head", "last-k", "lora", "full"] = "head"
    layers: Annotated[Count | None, Needs("method", ("last-k", "lora"))] = None
    rank: Annotated[Count | None, OF_LORA] = None
    alpha: Annotated[Positive | None, OF_LORA] = None
    targets: Annotated[tuple[str, ...] | None, OF_LORA] = None
    freeze_a: Annotated[bool | None, OF_LORA] = None
    head: Annotated[Literal["frozen", "trained", "lora"] | None, OF_LORA] = None
    """Under `lora`: what becomes of the head, or of what is pretrained of it; unless said that is frozen."""

    @property
    def description(self) -> str:
        """What is tuned, in a word or two."""
        return f"last-k with layers = {self.layers or 1}" if self.method == "last-k" else self.method


class TuneStage(Tuned):
    """One of `tune.then`: what is tuned from then on.

    Its stage begins `after` so many rounds of the one before, or when so many measurements at the clients
    (`patience`) have brought nothing better; it starts then from the best model.
    """

    after: Count | None = None
    patience: Count | None = None
    lr: Positive | None = None

    @model_validator(mode="after")
    def _begins_at_some_time(self) -> Self:
        if (self.after is None) == (self.patience is None):
            found = "neither" if self.after is None else "both"
            raise ValueError(f"expected after (rounds) or patience (measurements), found {found}")
        return self


class TuneSection(Tuned):
    """`[tune]`: which tensors are trained and travel, at first and `then`."""

    hidden: Count | None = None
    head_init: Literal["prototype", "ridge"] | None = None
    ridge: Annotated[Positive | None, Needs("head_init", ("ridge",))] = None
    feature_norm: Annotated[Positive | None, Needs("head_init")] = None
    """Under a promise of privacy: the L2 norm that an example's features are clipped to in `head_init`."""
    lora_merge: Annotated[
        Literal["average", "ffa", "rolora", "fedex", "flora", "flexlora"] | None, OF_LORA
    ] = None
    """How LoRA's factors merge over clients; `average` unless said."""
    lora_ranks: dict[str, Count] | None = None
    """By client: the rank of those that can't carry `rank`, with `lora_merge = "flexlora"`."""
    keep_sums: Annotated[bool, Needs("head_init")] = False
    """With `head_init`: the run keeps each client's sums, so that `atoll forget` can take them away again."""
    then: tuple[TuneStage, ...] = ()

    @property
    def trains_a(self) -> bool:
        """Whether LoRA's A is trained, and not only B."""
        return not self.freeze_a and self.lora_merge != "ffa"

    @property
    def default_rank(self) -> int:
        """LoRA's rank, where no client has one of its own."""
        return self.rank or 8

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys that say which tensors."""
        return tuple(Tuned.model_fields)


def grows(before: Tuned, after: Tuned) -> bool:
    """Whether everything that was tuned before is tuned after, and more."""
    order = {"head": {"last-k", "lora", "full"}, "last-k": {"last-k", "full"}}
    if after.method not in order.get(before.method, set()) or after.head in ("frozen", "lora"):
        return False
    return before.method != after.method or (after.layers or 1) > (before.layers or 1)
