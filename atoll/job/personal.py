"""`[personal]`: which part of the model each client keeps; also checks of meta-learning and clustering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from atoll.job.section import Between, Count, Needs, NotNegative, Section

if TYPE_CHECKING:
    from atoll.job.job import Job


OF_MIXTURES = Needs("keep", ("mixture",))


class PersonalSection(Section):
    """`[personal]`: what each client keeps from round to round, and how that is trained."""

    keep: Literal["head", "norms", "lora-b", "mixture"] | None = None
    method: Annotated[Literal["ditto", "apfl"], OF_MIXTURES] = "ditto"
    pull: Annotated[NotNegative, OF_MIXTURES, Needs("method", ("ditto",))] = 0.1
    epochs: Annotated[Count | None, OF_MIXTURES, Needs("method", ("ditto",))] = None
    mixing: Annotated[Between, OF_MIXTURES, Needs("method", ("apfl",))] = 0.5
    head_epochs: Annotated[Count | None, Needs("keep", ("head",))] = None

    @property
    def mixing_weight(self) -> float:
        """The weight of a client's own model in APFL's mixture; 0 if the job doesn't use APFL."""
        return self.mixing if self.keep == "mixture" and self.method == "apfl" else 0.0

    @property
    def splits(self) -> bool:
        """Whether a part of the model's tensors stays with the clients."""
        return self.keep in ("head", "norms", "lora-b")


def check_personal(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if clients can't keep what `personal.keep` says."""
    keep = job.personal.keep
    if keep is None:
        return
    if job.personal.splits and job.tune.method == "head":
        raise ValueError(
            f"personal.keep: {keep!r} would leave nothing to merge with tune.method = 'head'; expected"
            " 'mixture', or last-k, lora or full"
        )
    if keep == "lora-b" and (job.tune.method != "lora" or not job.tune.trains_a):
        raise ValueError(
            "personal.keep: 'lora-b' shares LoRA's A and keeps its B; expected tune.method = 'lora' with both"
            " factors trained"
        )
    if keep == "norms" and job.tune.method == "lora":
        raise ValueError("personal.keep: 'norms' are not trained with tune.method = 'lora'; expected 'head'")
    if job.personal.splits and job.backbone.prune is not None:
        raise ValueError(f"personal.keep: {keep!r} excludes backbone.prune; expected 'mixture'")
    _check_promises(job)
    if job.personal.mixing_weight:
        _check_apfl(job)
    if job.evaluate.patience is not None:
        raise ValueError(
            "personal.keep: clients keep what their last rounds left, not the best round's; expected none"
            " with evaluate.patience"
        )


def _check_apfl(job: Job) -> None:
    """Check APFL's requirements; it trains the client's model and a copy of the shared one together."""
    if job.strategy.name == "fedprox":
        raise ValueError(
            "personal.method: 'apfl' mixes with a model that takes plain local steps; expected 'ditto' with"
            " strategy.name = 'fedprox'"
        )
    if job.train.precision == "fp16":
        raise ValueError(
            "train.precision: 'fp16' scales gradients, and 'apfl' weighs them; expected 'fp32' or 'bf16'"
        )
    if job.backbone.prune is not None:
        raise ValueError(
            "backbone.prune: 'apfl' would fill what was left out; expected none, found"
            f" {job.backbone.prune:g}"
        )


def _check_promises(job: Job) -> None:
    """Check that updates don't depend on what clients keep, if privacy forbids it; a mixture's never do."""
    keep = job.personal.keep
    if job.personal.splits and job.privacy.units:
        raise ValueError(
            f"personal.keep: {keep!r} makes updates depend on what clients keep, which learns without noise;"
            f" expected 'mixture' or none with privacy.unit = {job.privacy.unit!r}"
        )
    if job.personal.splits and job.federation.secure_aggregation:
        raise ValueError(
            f"personal.keep: {keep!r} is for updates that travel alone; expected 'mixture' or none with"
            " federation.secure_aggregation"
        )
    if job.privacy.audit:
        raise ValueError("privacy.audit: a run with personal.keep can't be attacked; expected false")


def check_inner_steps(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if inner steps don't work in this job."""
    name = job.strategy.name
    if not job.strategy.has_inner_steps:
        return
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name} takes a step's gradients where other steps led, so that no clipping"
            f" bounds what one example changes; expected another strategy with privacy.unit ="
            f" {job.privacy.unit!r}"
        )
    if job.federation.secure_aggregation and not job.privacy.units:
        raise ValueError(
            f"strategy.name: {name} counts clients evenly, and a secure sum without a promise by their"
            " examples; expected another strategy, or federation.secure_aggregation = false"
        )
    if job.personal.keep is not None:
        raise ValueError(
            f"personal.keep: {name} makes one model for all to adapt; expected none, found"
            f" {job.personal.keep!r}"
        )
    if job.train.precision == "fp16":
        raise ValueError(
            f"train.precision: 'fp16' scales gradients, and {name} moves by them; expected 'fp32' or 'bf16'"
        )
    if job.backbone.prune is not None:
        raise ValueError(
            f"backbone.prune: {name}'s inner step would fill what was left out; expected none, found"
            f" {job.backbone.prune:g}"
        )


def check_clusters(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if the job needs one model for all clients.

    That client-level privacy, secure sums and concurrency exclude clustering is checked elsewhere.
    """
    name = job.strategy.name
    if not job.strategy.makes_clusters:
        return
    if "example" in job.privacy.units:
        raise ValueError(
            f"strategy.name: {name}'s clients say which model fits their examples, which no noise protects;"
            f" expected another strategy with privacy.unit = {job.privacy.unit!r}"
        )
    for key, is_set, why in (
        ("federation.error_feedback", job.feeds_errors_back,
         "what compression lost belongs to the model of one cluster, and a client may choose another"),
        ("federation.selection", job.federation.chooses_by_losses,
         "losses of several models don't compare"),
        ("personal.keep", job.personal.keep is not None, "what a client keeps would fit one cluster's model"),
        ("tune.head_init", job.tune.head_init is not None, "a closed form makes one head for all"),
        ("tune.then", bool(job.tune.then), "what is tuned later would begin with one model"),
        ("tune.lora_ranks", job.tune.lora_ranks is not None, "clients start from their cluster's factors"),
        ("train.teacher", job.train.teacher is not None, "clients choose by the task's own loss"),
        ("backbone.prune", job.backbone.prune is not None, "it is one model that is pruned"),
        ("evaluate.adapt", job.evaluate.adapt is not None, "clients adapt the one model that all share"),
    ):  # fmt: skip
        if is_set:
            raise ValueError(f"{key}: with strategy.name = {name!r} {why}; leave it out")
