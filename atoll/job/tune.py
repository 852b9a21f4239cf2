"""`[tune]`: which tensors are trained and travel, and how that changes on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from atoll.job.section import Count, Needs, Positive, Section

if TYPE_CHECKING:
    from atoll.job.job import Job

OF_LORA = Needs("method", ("lora",))
OF_SEEDS = Needs("method", ("seeds",))


class Tuned(Section):
    """Which tensors are trained and travel."""

    method: Literal["head", "last-k", "lora", "full", "seeds"] = "head"
    layers: Annotated[Count | None, Needs("method", ("last-k", "lora"))] = None
    rank: Annotated[Count | None, OF_LORA] = None
    alpha: Annotated[Positive | None, OF_LORA] = None
    rslora: Annotated[bool, OF_LORA] = False
    """Rank-stabilised LoRA: factors are scaled by alpha over the root of the rank, not over the rank."""
    targets: Annotated[tuple[str, ...] | None, OF_LORA] = None
    freeze_a: Annotated[bool | None, OF_LORA] = None
    head: Annotated[Literal["frozen", "trained", "lora"] | None, OF_LORA] = None
    """Under `lora`: what becomes of the head, or of what is pretrained of it; unless said that is frozen."""

    @property
    def default_rank(self) -> int:
        """LoRA's rank, where no client has one of its own."""
        return self.rank or 8

    @property
    def lora_alpha(self) -> float:
        """What scales LoRA's product: over the rank, or with `rslora` over its root (Kalajdzievski 2023).

        Unless said, the product is scaled by 2 for every rank, and with `rslora` by 16 over the rank's root.
        """
        return self.alpha or (16 if self.rslora else 2 * self.default_rank)

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
            count = "neither" if self.after is None else "both"
            raise ValueError(f"expected after (rounds) or patience (measurements), found {count}")
        return self


class TuneSection(Tuned):
    """`[tune]`: which tensors are trained and travel, at first and `then`."""

    hidden: Count | None = None
    head_init: Literal["prototype", "ridge", "gaussian"] | None = None
    ridge: Annotated[Positive | None, Needs("head_init", ("ridge", "gaussian"))] = None
    feature_norm: Annotated[Positive | None, Needs("head_init")] = None
    """Under a promise of privacy: the L2 norm that an example's features are clipped to in `head_init`."""
    lora_merge: Annotated[
        Literal["average", "ffa", "rolora", "fedex", "flora", "flexlora", "fedsb"] | None, OF_LORA
    ] = None
    """How LoRA's factors merge over clients; `average` unless said."""
    lora_ranks: dict[str, Count] | None = None
    """By client: the rank of those that can't carry `rank`, with `lora_merge = "flexlora"`."""
    seeds: Annotated[int | None, Field(ge=1, le=1_000_000), OF_SEEDS] = None
    """K, how many directions all weights move along; 4096 unless said. A message has a number for each."""
    perturbation: Annotated[Positive | None, OF_SEEDS] = None
    """How far beside the weights the loss is taken, in multiples of a direction; 0.001 unless said."""
    keep_sums: Annotated[bool, Needs("head_init")] = False
    """With `head_init`: the run keeps each client's sums, so that `atoll forget` can take them away again."""
    then: tuple[TuneStage, ...] = ()

    @property
    def trains_a(self) -> bool:
        """Whether LoRA's A is trained, and not only B or a part of it."""
        return not self.freeze_a and self.lora_merge not in ("ffa", "fedsb")

    @property
    def num_seeds(self) -> int:
        """K, the number of directions with `method = "seeds"`."""
        return self.seeds or 4096

    @property
    def distance(self) -> float:
        """How far beside the weights the loss is taken, with `method = "seeds"`."""
        return self.perturbation or 1e-3

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


def check_seeds(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where directions' coefficients can't be trained so.

    What needs a gradient has none there, and what is done to a step has to be done to its one coefficient.
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
    """Why the job's strategy can't go with coefficients of directions; nothing where it can."""
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
