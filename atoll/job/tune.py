"""`[tune]`: which tensors are trained and sent, and how that changes during a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from atoll.job.section import Count, Needs, Positive, Section

if TYPE_CHECKING:
    from atoll.job.job import Job

OF_LORA = Needs("method", ("lora",))
OF_SEEDS = Needs("method", ("seeds",))


class Tuned(Section):
    """The keys that say which tensors are trained and sent."""

    method: Literal["head", "last-k", "lora", "full", "seeds"] = "head"
    layers: Annotated[Count | None, Needs("method", ("last-k", "lora"))] = None
    rank: Annotated[Count | None, OF_LORA] = None
    alpha: Annotated[Positive | None, OF_LORA] = None
    rslora: Annotated[bool, OF_LORA] = False
    """Rank-stabilised LoRA: factors are scaled by alpha / sqrt(rank) instead of alpha / rank."""
    targets: Annotated[tuple[str, ...] | None, OF_LORA] = None
    freeze_a: Annotated[bool | None, OF_LORA] = None
    head: Annotated[Literal["frozen", "trained", "lora"] | None, OF_LORA] = None
    """With `lora`: how the head is tuned; by default its pretrained part is frozen."""

    @property
    def default_rank(self) -> int:
        """LoRA's rank for clients without a rank of their own in `lora_ranks`."""
        return self.rank or 8

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha: the factors' product is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank).

        The latter is that of Kalajdzievski 2023. The default is 2 * rank, with `rslora` 16.
        """
        return self.alpha or (16 if self.rslora else 2 * self.default_rank)

    @property
    def description(self) -> str:
        """What is tuned, as text for messages."""
        return f"last-k with layers = {self.layers or 1}" if self.method == "last-k" else self.method


class TuneStage(Tuned):
    """One stage of `tune.then`: what is tuned from its begin on.

    It begins `after` that many rounds of the previous stage, or when `patience` evaluations at the clients in
    a row have brought no improvement; then it starts from the best model.
    """

    after: Count | None = None
    patience: Count | None = None
    lr: Positive | None = None

    @model_validator(mode="after")
    def _begins_at_some_time(self) -> Self:
        if (self.after is None) == (self.patience is None):
            count = "neither" if self.after is None else "both"
            raise ValueError(f"expected after (rounds) or patience (measurements), found {count}")
        return self


class TuneSection(Tuned):
    """`[tune]`: which tensors are trained and sent in the first stage, and in later stages (`then`)."""

    hidden: Count | None = None
    head_init: Literal["prototype", "ridge", "gaussian"] | None = None
    ridge: Annotated[Positive | None, Needs("head_init", ("ridge", "gaussian"))] = None
    feature_norm: Annotated[Positive | None, Needs("head_init")] = None
    """With privacy: the L2 norm to which each example's features are clipped for `head_init`."""
    lora_merge: Annotated[
        Literal["average", "ffa", "rolora", "fedex", "flora", "flexlora", "fedsb"] | None, OF_LORA
    ] = None
    """How LoRA's factors are merged over clients; by default `average`."""
    lora_ranks: dict[str, Count] | None = None
    """With `lora_merge = "flexlora"`: by client, a rank smaller than `rank`."""
    seeds: Annotated[int | None, Field(ge=1, le=1_000_000), OF_SEEDS] = None
    """K, the number of random directions along which weights move (default 4096); updates have K numbers."""
    perturbation: Annotated[Positive | None, OF_SEEDS] = None
    """The distance at which the loss is evaluated, as a multiple of a direction; by default 0.001."""
    keep_sums: Annotated[bool, Needs("head_init")] = False
    """With `head_init`: the run stores each client's sums, so that `atoll forget` can subtract them later."""
    then: tuple[TuneStage, ...] = ()

    @property
    def trains_a(self) -> bool:
        """Whether LoRA's factor A is trained, and not only B or a part of it."""
        return not self.freeze_a and self.lora_merge not in ("ffa", "fedsb")

    @property
    def num_seeds(self) -> int:
        """K, the number of directions with `method = "seeds"`."""
        return self.seeds or 4096

    @property
    def distance(self) -> float:
        """With `method = "seeds"`: the distance of the loss's evaluation, as a multiple of a direction."""
        return self.perturbation or 1e-3

    @classmethod
    def tuned_keys(cls) -> tuple[str, ...]:
        """The names of the keys that say which tensors are tuned."""
        return tuple(Tuned.model_fields)


def is_superset(before: Tuned, after: Tuned) -> bool:
    """Whether `after` tunes everything that `before` tunes, and more."""
    order = {"head": {"last-k", "lora", "full"}, "last-k": {"last-k", "full"}}
    if after.method not in order.get(before.method, set()) or after.head in ("frozen", "lora"):
        return False
    return before.method != after.method or (after.layers or 1) > (before.layers or 1)


def check_seeds(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job doesn't work with `method = "seeds"`.

    This method has no gradients, and each local step changes a single coefficient.
    """
    if job.tune.method != "seeds":
        return
    one = "a step moves one coefficient alone"
    for table, key, why, expected in (
        ("train", "optimizer", one, "'sgd'"),
        ("train", "momentum", one, "0"),
        ("train", "weight_decay", one, "0"),
        ("train", "layer_decay", "a coefficient moves all layers", "none"),
        ("train", "dropout", "losses are compared without it", "none"),
        ("train", "checkpoint_activations", "no activations are kept", "false"),
        ("personal", "keep", "nothing is trained but the coefficients that all share", "none"),
    ):
        section: Section = getattr(job, table)
        if section.is_given(key):
            value = getattr(section, key)
            raise ValueError(
                f"{table}.{key}: with tune.method = 'seeds' {why}; expected {expected}, found {value!r}"
            )
    if job.train.precision == "fp16":
        raise ValueError(
            "train.precision: with tune.method = 'seeds' no gradient can vanish; expected 'fp32' or 'bf16',"
            " found 'fp16'"
        )
    if "example" in job.privacy.units:
        raise ValueError(
            "privacy.unit: with tune.method = 'seeds' no example has a gradient to clip; expected 'client' or"
            f" 'none', found {job.privacy.unit!r}"
        )
    if why := _what_a_strategy_lacks(job):
        raise ValueError(
            f"strategy.name: with tune.method = 'seeds' {why}; expected another, found {job.strategy.name!r}"
        )


def _what_a_strategy_lacks(job: Job) -> str:
    """Why the job's strategy doesn't work with `method = "seeds"`; empty if it does."""
    strategy = job.strategy
    may_pull = strategy.name in ("fedprox", "fedasync") and strategy.proximal_mu != 0
    if may_pull or strategy.name == "flwr:FedProx":
        return "a step moves one coefficient, and a proximal term pulls at all"
    if strategy.keeps_client_state or strategy.has_inner_steps:
        return "there is no gradient that it could correct or follow"
    if strategy.keeps_last_model:
        return "no features are contrasted"
    if strategy.makes_clusters:
        return "all models begin with the one head that the seed draws"
    if strategy.name == "signsgd":
        return "most coefficients don't move in a round, and would vote by a coin"
    if strategy.sends_losses:
        return "a client's loss is known beside the model that it received, and not at it"
    return ""
