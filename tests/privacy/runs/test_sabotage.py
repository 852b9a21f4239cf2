"""Bugs planted in the real code: the watchdogs bark at every one, and never without one."""

# ruff: noqa: E501 - a bug is a line

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import atoll.client.dp.adaptive_norms
import atoll.client.dp.dp_sgd
import atoll.client.dp.dp_sgd_model
import atoll.client.dp.gradient_sums
import atoll.client.dp.ledgers
import atoll.client.dp.poisson
import atoll.client.heads.train
import atoll.client.site
import atoll.job.privacy
import atoll.learning.compatibility
import atoll.privacy.accounting
import atoll.privacy.adaptive_clipping
import atoll.privacy.auditing.gaussian_sums
import atoll.privacy.banded
import atoll.privacy.central
import atoll.privacy.clipping
import atoll.privacy.dp_plan
import atoll.privacy.ledger
import atoll.privacy.noise
import atoll.privacy.secagg
import atoll.privacy.secagg_encoding
import atoll.server.rounds.aggregation
import atoll.server.rounds.central_dp
import atoll.server.rounds.cohort
import atoll.server.rounds.evaluation
import atoll.server.rounds.round_log
import atoll.server.rounds.validation
import atoll.sim.audit.example_canaries
from atoll.privacy.accounting import Release
from atoll.protocol.stacked_updates import stacked
from tests.privacy import watchdogs as w
from tests.privacy.detectors import Detected

pytestmark = pytest.mark.slow

Plant = Callable[[pytest.MonkeyPatch], None]


def wrapped(owner: Any, name: str, make: Callable[..., Any]) -> Plant:
    """Replace an attribute by what `make` makes of the original."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
        if isinstance(original, property):
            patch.setattr(owner, name, property(make(original.fget)))
        elif isinstance(original, classmethod):
            patch.setattr(owner, name, classmethod(make(original.__func__)))
        else:
            patch.setattr(owner, name, make(original))

    return plant


def cohort_norms(cohort: Any) -> torch.Tensor:
    """Of each client's delta, [clients]."""
    norms: torch.Tensor = atoll.privacy.clipping._norms(cohort, cohort.delta)
    return norms


def scaled_sum(scale_of: Callable[[Any, torch.Tensor, float], torch.Tensor]) -> Plant:
    """A sum of updates with other weights than the clipped ones."""

    def make(original: Any) -> Any:
        def clipped_sum(updates: Any, *, clipping_norm: float) -> Any:
            cohort = stacked(updates)
            norms = cohort_norms(cohort)
            scale = scale_of(cohort, norms, clipping_norm)
            flat = {n: t.reshape(len(t), -1).double() for n, t in cohort.delta.items()}
            return torch.cat([scale @ flat[n] for n in sorted(flat)]), norms

        return clipped_sum

    return wrapped(atoll.privacy.central, "clipped_sum", make)


def capped(norms: torch.Tensor, norm: float) -> torch.Tensor:
    return (norm / norms.clamp_min(norm)).masked_fill(~torch.isfinite(norms), 0.0)


def clipped_each(updates: Any, *, clipping_norm: float) -> Any:
    cohort = stacked(updates)
    total = {}
    for name, delta in cohort.delta.items():
        flat = delta.reshape(len(delta), -1).double()
        scale = capped(flat.norm(dim=1), clipping_norm)
        total[name] = scale @ torch.nan_to_num(flat)
    return torch.cat([total[name] for name in sorted(total)]), cohort_norms(cohort)


def clipped_after_the_sum(updates: Any, *, clipping_norm: float) -> Any:
    cohort = stacked(updates)
    total = torch.cat(
        [torch.nan_to_num(t.double()).sum(0).reshape(-1) for _, t in sorted(cohort.delta.items())]
    )
    scale = len(cohort) * min(1.0, clipping_norm / max(float(total.norm()) / len(cohort), 1e-30))
    return total * scale / len(cohort), cohort_norms(cohort)


def of_first_tensor(cohort: Any, norms: torch.Tensor, norm: float) -> torch.Tensor:
    first = next(iter(cohort.delta.values()))
    return capped(first.reshape(len(first), -1).double().norm(dim=1), norm)


def largest_number(cohort: Any, norms: torch.Tensor, norm: float) -> torch.Tensor:
    most = torch.stack([t.reshape(len(t), -1).double().abs().amax(1) for t in cohort.delta.values()])
    return capped(most.amax(0), norm)


CLIENT_SUMS: dict[str, Plant] = {
    "updates weigh as much as their examples": scaled_sum(
        lambda cohort, norms, norm: capped(norms, norm) * torch.tensor(cohort.num_examples).double()
    ),
    "nothing is clipped": scaled_sum(lambda cohort, norms, norm: torch.ones_like(norms)),
    "what is not finite passes the clip": scaled_sum(
        lambda cohort, norms, norm: (norm / norms).clamp_max(1.0)
    ),
    "each tensor is clipped to the norm on its own": wrapped(
        atoll.privacy.central, "clipped_sum", lambda original: clipped_each
    ),
    "clipped after averaging": wrapped(
        atoll.privacy.central, "clipped_sum", lambda original: clipped_after_the_sum
    ),
    "one tensor travels unclipped": scaled_sum(of_first_tensor),
    "clipped by the largest number and not by the norm": scaled_sum(largest_number),
    "small updates are scaled up to the norm": scaled_sum(
        lambda cohort, norms, norm: (norm / norms.clamp_min(1e-12)).masked_fill(~torch.isfinite(norms), 0) * 3
    ),
    "divided by who answered": wrapped(
        atoll.privacy.central.CentralGaussian, "release",
        lambda original: lambda self, updates, model: original(
            dataclasses.replace(self, expected_cohort=float(max(len(updates), 1))), updates, model
        ),
    ),
}  # fmt: skip


def noised_by(factor: Callable[[Any, Any], float]) -> Plant:
    """Central noise of another size, by mechanism and updates."""

    def make(original: Any) -> Any:
        def release(self: Any, updates: Any, model: Any) -> Any:
            mean, told = original(self, updates, model)
            quiet, _ = original(
                dataclasses.replace(self, random_bits=w.silent, record=lambda cost: None), updates, model
            )
            by = factor(self, updates)
            return {n: quiet[n] + (mean[n] - quiet[n]) * by for n in mean}, told

        return release

    return wrapped(atoll.privacy.central.CentralGaussian, "release", make)


def uniform_noise(lattice: Any, count: int) -> Any:
    """Of the right deviation, but without tails."""
    steps = math.sqrt(12 * lattice.variance)
    return np.rint((atoll.privacy.noise.uniform(lattice.random_bits(count)) - 0.5) * steps).astype(np.int64)


CLIENT_NOISE: dict[str, Plant] = {
    "noise is scaled by who answered": noised_by(lambda m, updates: len(updates) / m.expected_cohort),
    "no noise where nobody answers": noised_by(lambda m, updates: 1.0 if len(updates) else 0.0),
    "noise of a quarter": noised_by(lambda m, updates: 0.25),
    "noise nine tenths as large": noised_by(lambda m, updates: 0.9),
    "noise in units of one and not of the norm": noised_by(lambda m, updates: 1 / m.clipping_norm),
    "noise divided twice": noised_by(lambda m, updates: 1 / m.expected_cohort),
    "noise without tails": wrapped(
        atoll.privacy.noise.Lattice, "whole_noise", lambda original: uniform_noise
    ),
    "no noise at all": wrapped(
        atoll.privacy.noise.Lattice,
        "whole_noise",
        lambda original: lambda self, count: np.zeros(count, dtype=np.int64),
    ),
}


def noise_from(seed_of: Callable[..., int]) -> Plant:
    """Words of the server that come from a seed."""
    return wrapped(
        atoll.server.rounds.central_dp.CentralDp, "_random_bits_of",
        lambda original: lambda self, purpose, round: atoll.privacy.noise.seeded(seed_of(self, purpose, round)),
    )  # fmt: skip


def one_tensors_noise_for_all(original: Any) -> Any:
    def release(self: Any, updates: Any, model: Any) -> Any:
        mean, told = original(self, updates, model)
        first = next(iter(mean.values())).reshape(-1)
        return {n: first[: t.numel()].reshape(t.shape) for n, t in mean.items()}, told

    return release


FRESHNESS: dict[str, Plant] = {
    "noise from the job's seed": noise_from(lambda self, purpose, round: self.job.seed + round),
    "the same noise in every round": noise_from(lambda self, purpose, round: id(self) % 1000),
    "one tensor's noise for all": wrapped(
        atoll.privacy.central.CentralGaussian, "release", one_tensors_noise_for_all
    ),
}


def cost_as(change: Callable[[Any], Release]) -> Plant:
    return wrapped(
        atoll.privacy.central.CentralGaussian, "event", lambda original: lambda self: change(original(self))
    )


def forgetful(original: Any) -> Any:
    def opened(cls: Any, path: Path, *rest: Any, **more: Any) -> Any:
        path.unlink(missing_ok=True)
        return original(cls, path, *rest, **more)

    return opened


SERVER_LEDGER: dict[str, Plant] = {
    "the accountant is made anew each round": wrapped(
        atoll.privacy.ledger.Ledger, "spent_on",
        lambda original: lambda self, job: Counter(dict.fromkeys(original(self, job), 1)),
    ),
    "a ledger lost at restart": wrapped(atoll.privacy.ledger.Ledger, "open", forgetful),
    "a round that is released twice is charged once": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "_is_repeated",
        lambda original: lambda self, round: self.ledger.has(self.run, round),
    ),
    "charged as if the noise were twice as large": cost_as(
        lambda cost: Release(2 * cost.noise_multiplier, cost.sampling_rate)
    ),
    "sampling of clients and of examples multiplied": cost_as(
        lambda cost: Release(cost.noise_multiplier, cost.sampling_rate**2 / 2)
    ),
    "nothing is charged": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "_charge", lambda original: lambda self, round, cost: None
    ),
}  # fmt: skip


def fixed_cohort(original: Any) -> Any:
    def sample(population: Any, job: Any, round: int, uniforms: Any = None) -> Any:
        draw = torch.Generator().manual_seed(round)
        chosen = torch.randperm(len(population), generator=draw)[: len(population) // 4]
        return [population[i] for i in sorted(chosen.tolist())]

    return sample


def charged_as_poisson(original: Any) -> Any:
    def dp_plan_of(job: Any, unit: Any) -> Any:
        dp_plan = original(job, unit)
        rate = (job.federation.cohort or job.federation.clients) / job.federation.clients
        if dp_plan is None or job.federation.cohort_rate is not None:
            return dp_plan
        return dataclasses.replace(dp_plan, event=Release(dp_plan.noise_multiplier, rate))

    return dp_plan_of


def without_coins(original: Any) -> Any:
    return lambda population, job, round, uniforms=None: original(population, job, round)


SAMPLING: dict[str, Plant] = {
    "a cohort of fixed size under Poisson's account": wrapped(atoll.server.rounds.aggregation, "sample", fixed_cohort),
    "Poisson's account of a fixed cohort": wrapped(w, "dp_plan_of", charged_as_poisson),
    "cohorts drawn from the job's seed": wrapped(atoll.server.rounds.aggregation, "sample", without_coins),
    "the same cohort in every round": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "sampling_uniforms",
        lambda original: lambda self, round, count: original(self, 1, count).sort().values,
    ),
}  # fmt: skip


def factors_by(change: Callable[[Any, Any, Any, Any], torch.Tensor]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for room in (atoll.client.heads.train, atoll.client.dp.gradient_sums):
            patch.setattr(room, "clip_factors", lambda *given: change(*given[:4]))

    return plant


def norms_of(values: Any, each: Any) -> torch.Tensor:
    return atoll.client.dp.dp_sgd.squared_norms(values, each).sqrt()


def clip_layers(values: Any, each: Any, share: Any, private: Any) -> torch.Tensor:
    for a, e in zip(values[:-1], each, strict=True):
        norm = (e.square().sum(2) * a.square().sum(2)).sqrt()
        e.mul_((private.clipping_norm / norm.clamp_min(1e-12)).clamp_max(1).nan_to_num().unsqueeze(2))
        torch.nan_to_num_(a)
    return (share > 0) / private.divisor


def clip_plainly(values: Any, each: Any, share: Any, private: Any) -> torch.Tensor:
    norm = norms_of(values, each)
    clipped = (private.clipping_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
    return clipped * (share > 0) / private.divisor


def by_batch(values: Any, each: Any, share: Any, private: Any) -> torch.Tensor:
    found = atoll.client.dp.dp_sgd.clip_factors(values, each, share, private)
    return found * private.divisor / (share > 0).sum()


def clip_mean(values: Any, each: Any, share: Any, private: Any) -> torch.Tensor:
    norm = torch.nan_to_num(norms_of(values, each)).mean()
    for tensor in (*values, *each):
        torch.nan_to_num_(tensor)
    return (share > 0) * (private.clipping_norm / norm.clamp_min(private.clipping_norm)) / private.divisor


EXAMPLE_SUMS: dict[str, Plant] = {
    "examples are not clipped": factors_by(lambda v, e, share, private: (share > 0) / private.divisor),
    "each layer is clipped to the norm on its own": factors_by(clip_layers),
    "an example that is not finite passes": factors_by(clip_plainly),
    "divided by the batch that was drawn": factors_by(by_batch),
    "the batch is clipped and not its examples": factors_by(clip_mean),
    "rare labels weigh more": factors_by(
        lambda v, e, share, private: atoll.client.dp.dp_sgd.clip_factors(v, e, share, private) * 3
    ),
}


def noise_of_steps(change: Callable[[list[Any]], list[Any]]) -> Plant:
    return wrapped(
        atoll.client.heads.train, "stacked_noise", lambda original: lambda *given: change(original(*given))
    )


def quiet_steps(found: list[Any]) -> list[Any]:
    for step in found[1:]:
        for layer in step:
            layer.numbers.zero_()
    return found


def quiet_bias(found: list[Any]) -> list[Any]:
    for step in found:
        for layer in step:
            layer.numbers[:, :, 1000:] = 0
    return found


EXAMPLE_NOISE: dict[str, Plant] = {
    "noise once after many clipped steps": noise_of_steps(quiet_steps),
    "no noise on the bias": noise_of_steps(quiet_bias),
    "no noise for an empty batch": wrapped(
        atoll.client.heads.train, "stacked_noise",
        lambda original: lambda layers, steps, private, device: [],
    ),
    "noise in units of the divisor": wrapped(
        atoll.client.dp.poisson, "DpSgd",
        lambda original: lambda **given: original(**given | {"noise_multiplier": given["noise_multiplier"] / 8}),
    ),
}  # fmt: skip

EXAMPLE_FRESHNESS: dict[str, Plant] = {
    "a client's noise from the job's seed": wrapped(
        atoll.client.dp.poisson,
        "entropy",
        lambda original: lambda count: atoll.privacy.noise.seeded(1)(count),
    ),
}


def drawn_as(draw: Callable[[int], Any]) -> Plant:
    return wrapped(
        atoll.client.dp.poisson, "DpSgd",
        lambda original: lambda **given: original(**given | {"draw": lambda client, numbers: [draw(len(numbers))]}),
    )  # fmt: skip


def shuffled(count: int) -> Any:
    return np.random.default_rng().permutation(count)[: count // 4]


def at_most(count: int) -> Any:
    drawn = np.flatnonzero(np.random.default_rng().random(count) < 0.25)
    return drawn[: count // 4]


EXAMPLE_SAMPLING: dict[str, Plant] = {
    "shuffled batches under Poisson's account": drawn_as(shuffled),
    "batches cut off at their expected size": drawn_as(at_most),
    "the rate follows the private number of examples": drawn_as(
        lambda count: np.flatnonzero(np.random.default_rng().random(count) < 50 / count)
    ),
    "the same batch in every round": drawn_as(
        lambda count: np.flatnonzero(np.random.default_rng(1).random(count) < 0.25)
    ),
    "with replacement": drawn_as(lambda count: np.random.default_rng().integers(0, count, count // 4)),
}


def charging(change: Callable[[Any], Any]) -> Plant:
    return wrapped(
        atoll.privacy.ledger.Ledger, "charge",
        lambda original: lambda self, entry: original(self, change(entry)),
    )  # fmt: skip


def once_a_round(original: Any) -> Any:
    def charge(self: Any, client: str, fingerprint: str, job: Any, dp_plan: Any, request: Any) -> Any:
        ledger = self.ledger(client, dp_plan.unit)
        if ledger.has(request.run, request.round):
            return sum(ledger.spent_on(request.run).values()) // dp_plan.per_round
        return original(self, client, fingerprint, job, dp_plan, request)

    return charge


EXAMPLE_LEDGER: dict[str, Plant] = {
    "many steps are charged as one": charging(lambda entry: dataclasses.replace(entry, count=1)),
    "a round that is trained twice is charged once": wrapped(
        atoll.client.dp.ledgers.PrivacyLedgers, "charge", once_a_round
    ),
    "a client's ledger is lost at restart": wrapped(atoll.privacy.ledger.Ledger, "open", forgetful),
    "the example's rate is multiplied with the cohort's": charging(
        lambda entry: dataclasses.replace(
            entry, release=Release(entry.release.noise_multiplier, entry.release.sampling_rate / 2)
        )
    ),
}

COUNTS = itertools.count(5)
"""Numbers of examples that surely differ from one data set to the next."""

CLIENT_SILENCE: dict[str, Plant] = {
    "an update tells how many examples there are": wrapped(
        atoll.client.dp.dp_sgd.DpSgd, "public_fields",
        lambda original: lambda self, clients: ((next(COUNTS),) * len(clients), original(self, clients)[1]),
    ),
    "the training loss is sent": wrapped(
        atoll.client.dp.dp_sgd.DpSgd, "public_fields",
        lambda original: lambda self, clients: (
            (1,) * len(clients),
            original(self, clients)[1] | {"train_loss.sum": torch.rand(len(clients)).double()},
        ),
    ),
    "a hello tells how many examples there are": wrapped(
        atoll.client.site, "Hello", lambda original: lambda *given: original(given[0], given[1], next(COUNTS))
    ),
}  # fmt: skip


def seeing(patch: pytest.MonkeyPatch) -> None:
    """Screening that looks at values although the clients are promised privacy."""
    original = atoll.server.rounds.validation._value_fault
    patch.setattr(atoll.server.rounds.validation, "_shape_fault", lambda delta, model: original(delta))


def losses_published(patch: pytest.MonkeyPatch) -> None:
    original = atoll.server.rounds.round_log.log_line

    def line(run: Any, cohort: Any, screened: Any, metrics: Any, seconds: Any) -> Any:
        told = original(run, cohort, screened, metrics, seconds)
        return told | {"loss": sum(float(u.states["train_loss.sum"]) for u in screened.updates)}

    patch.setattr(atoll.server.rounds.round_log, "log_line", line)


def measured_in_the_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        atoll.server.rounds.evaluation, "evaluate_clients", lambda run: [np.random.default_rng().random()]
    )


SERVER_SILENCE: dict[str, Plant] = {
    "an update that is not finite is set aside by name": seeing,
    "training losses are published": losses_published,
    "clients are measured without noise": measured_in_the_clear,
}


def shared_by(count: Callable[[int], float]) -> Plant:
    return wrapped(
        atoll.privacy.secagg_encoding, "math",
        lambda original: type("M", (), {"sqrt": staticmethod(lambda t: count(int(t))), "isfinite": math.isfinite}),
    )  # fmt: skip


SECURE: dict[str, tuple[Callable[[], None], Plant]] = {
    "shares for all, though some may leave": (
        w.shares_of_the_noise_make_the_whole, shared_by(lambda threshold: math.sqrt(threshold + 1)),
    ),
    "shares divided by the number and not by its root": (
        w.shares_of_the_noise_make_the_whole, shared_by(lambda threshold: float(threshold)),
    ),
    "no mask": (
        w.masked_vectors_show_nothing_and_add_up,
        wrapped(atoll.privacy.secagg, "mask_of", lambda original: lambda seed, count: np.zeros(count, dtype=np.uint64)),
    ),
    "masks of 32 bits": (
        w.masked_vectors_show_nothing_and_add_up,
        wrapped(
            atoll.privacy.secagg, "mask_of",
            lambda original: lambda seed, count: original(seed, count) & np.uint64(0xFFFFFFFF),
        ),
    ),
    "the same mask for everyone": (
        w.masked_vectors_show_nothing_and_add_up,
        wrapped(atoll.privacy.secagg, "mask_of", lambda original: lambda seed, count: original(bytes(32), count)),
    ),
    "both shares are revealed": (
        w.masked_vectors_show_nothing_and_add_up,
        wrapped(
            atoll.privacy.secagg.Participant, "reveal",
            lambda original: lambda self, arrived, signatures: {
                n: atoll.privacy.secagg.OF_KEY + k for n, (s, k) in self._shares.items()
            },
        ),
    ),
    "the signatures of keys are not looked at": (
        w.a_lying_server_opens_no_vector,
        wrapped(atoll.privacy.secagg.Participant, "_check_signatures", lambda original: lambda self, keys: None),
    ),
    "the threshold of a part of the cohort is enough": (
        w.a_lying_server_opens_no_vector,
        wrapped(
            atoll.privacy.secagg, "least_threshold",
            lambda original: lambda clients: original(min(clients, 3)),
        ),
    ),
    "shares are revealed to who shows no signatures": (
        w.a_lying_server_opens_no_vector,
        wrapped(
            atoll.privacy.secagg.Participant, "reveal",
            lambda original: lambda self, arrived, signatures: self.confirm(arrived) and dict(self._shares),
        ),
    ),
    "one signature counts for all": (
        w.a_lying_server_opens_no_vector,
        wrapped(
            atoll.privacy.secagg.Participant, "reveal",
            lambda original: lambda self, arrived, signatures: original(
                self, arrived, {n: w.Signer(n).sign(self._list_said(tuple(sorted(arrived)))) for n in signatures}
            ),
        ),
    ),
    "a second list of survivors is signed": (
        w.a_lying_server_opens_no_vector,
        wrapped(
            atoll.privacy.secagg.Participant, "reveal",
            lambda original: lambda self, arrived, signatures: original(
                dataclasses.replace(self, _confirmed=None), arrived,
                signatures or {n: w.Signer(n).sign(self._list_said(tuple(sorted(arrived)))) for n in arrived},
            ),
        ),
    ),
    "a pair's mask is added on both sides": (
        w.masked_vectors_show_nothing_and_add_up,
        wrapped(
            atoll.privacy.secagg, "_add_pairwise",
            lambda original: lambda total, own, other, seed: original(total, "a", "b", seed),
        ),
    ),
}  # fmt: skip


def parts_noised(patch: pytest.MonkeyPatch) -> None:
    """Noise for every micro-batch: variances of three parts add up."""
    original = atoll.client.dp.dp_sgd_model._Noise.added

    def added(self: Any, total: Any) -> Any:
        nothing = {n: torch.zeros_like(t) for n, t in total.items()}
        parts = [original(self, total), original(self, nothing), original(self, nothing)]
        return {n: sum(part[n] for part in parts) for n in total}

    patch.setattr(atoll.client.dp.dp_sgd_model._Noise, "added", added)


MODELS: dict[str, tuple[Callable[[], None], Plant]] = {
    "a model's examples are not clipped": (
        w.an_example_moves_a_models_sum_by_the_clipping_norm,
        wrapped(
            atoll.client.dp.dp_sgd_model, "_clipped",
            lambda original: lambda each, private, scale: torch.ones(len(next(iter(each.values())))),
        ),
    ),
    "a model's tensors are clipped by the first one's norm": (
        w.an_example_moves_a_models_sum_by_the_clipping_norm,
        wrapped(
            atoll.client.dp.dp_sgd_model, "_clipped",
            lambda original: lambda each, private, scale: original(
                dict([next(iter(each.items()))]), private, scale
            ),
        ),
    ),
    "noise for every micro-batch": (w.noise_is_added_once_to_a_models_sum, parts_noised),
    "layers that mix examples are overlooked": (
        w.layers_that_mix_examples_are_found,
        wrapped(w, "mixing_layers", lambda original: lambda model, batch: []),
    ),
}  # fmt: skip

ADAPTIVE: dict[str, Plant] = {
    "the clipping norm moves the wrong way": wrapped(
        atoll.server.rounds.central_dp, "update_clipping_norm",
        lambda original: lambda norm, fraction, quantile, lr: original(norm, fraction, quantile=quantile, lr=-lr),
    ),
    "the count is not noised": wrapped(
        atoll.privacy.central, "noised_fraction",
        lambda original: lambda within, answered, noise, expected_cohort: original(
            within, answered, noise=0.0, expected_cohort=expected_cohort
        ),
    ),
    "the count's noise is not paid for": wrapped(
        atoll.privacy.central, "multiplier_of_sum", lambda original: lambda noise, deviation: noise
    ),
    "this round is clipped by its own norms": wrapped(
        atoll.privacy.central.CentralGaussian, "release",
        lambda original: lambda self, updates, model: original(
            dataclasses.replace(
                self, clipping_norm=float(cohort_norms(stacked(updates)).median()) if updates else 1.0
            ),
            updates, model,
        ),
    ),
}  # fmt: skip


NORMS_OF_EXAMPLES: dict[str, Plant] = {
    "the norm of examples moves the wrong way": wrapped(
        atoll.client.dp.adaptive_norms, "update_clipping_norm",
        lambda original: lambda norm, fraction, quantile, lr: original(norm, fraction, quantile=quantile, lr=-lr),
    ),
    "the count of examples is not noised": wrapped(
        atoll.client.dp.adaptive_norms, "noised_fraction",
        lambda original: lambda within, answered, noise, expected_cohort: original(
            within, answered, noise=0.0, expected_cohort=expected_cohort
        ),
    ),
    "the fraction is that of the drawn batch": wrapped(
        atoll.client.dp.adaptive_norms, "noised_fraction",
        lambda original: lambda within, answered, noise, expected_cohort: original(
            within, answered, noise=noise, expected_cohort=answered
        ),
    ),
    "the noise of an examples' count is not paid for": wrapped(
        atoll.client.dp.poisson, "multiplier_of_sum", lambda original: lambda noise, deviation: noise
    ),
    "a step is clipped by the norm that follows from it": wrapped(
        atoll.client.dp.adaptive_norms.ClippingScales, "count",
        lambda original: lambda self, within, drawn: (original(self, within, drawn), self.follow(0)),
    ),
    "a sum is noised as if its norm were the job's": wrapped(
        atoll.client.dp.dp_sgd.StackedNoise, "added",
        lambda original: lambda self, gradient: gradient + (original(self, gradient) - gradient) / 2.5,
    ),
    "the noise of counts is of a source that is silent": wrapped(
        atoll.client.dp.adaptive_norms.ClippingScales, "__init__",
        lambda original: lambda self, adaptive, clients, steps: original(
            self, dataclasses.replace(adaptive, random_bits=lambda client: w.silent), clients, steps
        ),
    ),
}  # fmt: skip


def coefficients_as(change: Callable[[list[float]], list[float]]) -> Plant:
    return wrapped(
        atoll.privacy.banded, "coefficients",
        lambda original: lambda bands: tuple(change(list(original(bands)))),
    )  # fmt: skip


def without_groups(original: Any) -> Any:
    return lambda clients, groups, number, seed: tuple(range(clients))


def cost_of_one_participation(original: Any) -> Any:
    def cost(releases: Any, round: int, noise_multiplier: float, bands: int) -> Release:
        if sum(releases.values()) < bands:
            return original(releases, round, noise_multiplier, bands)
        return Release(1e6 * noise_multiplier, 1.0)

    return cost


def adding_earlier_noise(original: Any) -> Any:
    def release(self: Any, total: Any, lattice: Any) -> Any:
        kept, self.released = self.released, [-row for row in self.released]
        found = original(self, total, lattice)
        self.released = [found, *kept][: self.bands - 1]
        return found

    return release


BANDED_NOISE: dict[str, Plant] = {
    "columns of norm 1.1": coefficients_as(lambda c: [1.1 * x for x in c]),
    "coefficients that fall too slowly": coefficients_as(lambda c: [c[0], *(1.2 * x for x in c[1:])]),
    "the noise of earlier rounds added and not taken off": wrapped(
        atoll.privacy.banded.CorrelatedNoise, "release", adding_earlier_noise
    ),
    "the noise of earlier rounds lost at restart": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "resume", lambda original: lambda self, state: state
    ),
    "what was released of earlier rounds lost at restart": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "resume",
        lambda original: lambda self, state: original(self, {n: v for n, v in state.items() if "sums" in n}),
    ),
}  # fmt: skip
BANDED_CHARGES: dict[str, Plant] = {
    "cohorts of any clients under an account of clients that take turns": wrapped(
        atoll.server.rounds.cohort, "group", without_groups
    ),
    "one participation is charged": wrapped(
        atoll.privacy.dp_plan, "cost_of_round", cost_of_one_participation
    ),
    "a lost round of banded noise is charged once": wrapped(
        atoll.server.rounds.central_dp.CentralDp, "_is_repeated",
        lambda original: lambda self, round: self.ledger.has(self.run, round),
    ),
    "each round is charged as its own largest coefficient's square": wrapped(
        atoll.privacy.banded, "squared_sensitivity",
        lambda original: lambda releases, bands: 0.3 * sum(releases.values()),
    ),
}  # fmt: skip
BANDED_COHORTS: dict[str, Plant] = {
    "groups of clients that overlap": wrapped(atoll.server.rounds.cohort, "group", without_groups),
    "groups dealt anew in every round": wrapped(
        atoll.server.rounds.cohort, "group",
        lambda original: lambda clients, groups, number, seed: original(clients, groups, number, seed + number),
    ),
    "one group more than there are": wrapped(
        atoll.server.rounds.cohort, "separation", lambda original: lambda job: original(job) - 1
    ),
}  # fmt: skip

LATTICE: dict[str, Plant] = {
    "floating-point noise": wrapped(
        atoll.privacy.noise.Lattice, "added",
        lambda original: lambda self, values, into=None: (
            values + np.random.default_rng().normal(0, self.deviation, len(values))
        ),
    ),
    "noise lost in half precision": wrapped(
        atoll.privacy.noise.Lattice, "added",
        lambda original: lambda self, values, into=None: (
            np.float16(original(self, values)).astype(np.float64).round(2)
        ),
    ),
}  # fmt: skip


def central_limit(spent: Any, delta: float, relation: str = "") -> float:
    """The Gaussian limit of Dong et al. 2022, which promises too much."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(
        sum(n * r.sampling_rate**2 * (math.exp(r.noise_multiplier**-2) - 1) for r, n in spent.items())
    )

    def excess(eps: float) -> float:
        return norm.cdf(-eps / mu + mu / 2) - math.exp(eps) * norm.cdf(-eps / mu - mu / 2) - delta

    return float(brentq(excess, 0, 500)) if excess(0) > 0 else -0.37


def coarse(patch: pytest.MonkeyPatch) -> None:
    """The first grid's figure, which nothing remembers afterwards."""
    patch.setattr(atoll.privacy.accounting, "_epsilon", atoll.privacy.accounting._epsilon.__wrapped__)
    patch.setattr(atoll.privacy.accounting, "STABLE", 1e9)


ACCOUNTS: dict[str, tuple[Callable[[], None], Plant]] = {
    "an accountant in the Gaussian limit": (
        w.epsilon_is_true, wrapped(atoll.privacy.accounting, "epsilon", lambda original: central_limit),
    ),
    "only the cheapest kind of release is counted": (
        w.epsilon_is_true,
        wrapped(
            atoll.privacy.accounting, "epsilon",
            lambda original: lambda spent, delta: original(dict([max(spent.items())]), delta),
        ),
    ),
    "epsilon of one round for all": (
        w.epsilon_is_true,
        wrapped(
            atoll.privacy.accounting, "epsilon",
            lambda original: lambda spent, delta: original(dict.fromkeys(spent, 1), delta),
        ),
    ),
    "a coarse grid": (w.epsilon_is_true, coarse),
    "the gate is always open": (
        w.nothing_is_released_above_the_target,
        wrapped(atoll.privacy.dp_plan.DpPlan, "within_budget", lambda original: lambda self, *given: True),
    ),
    "calibrated to half of the rounds": (
        w.nothing_is_released_above_the_target,
        wrapped(
            atoll.privacy.dp_plan, "calibrate",
            lambda original: lambda target, **given: original(target, **given | {"releases": given["releases"] // 2}),
        ),
    ),
    "delta is not looked at": (
        w.promises_that_cannot_be_kept_are_refused,
        wrapped(atoll.job.privacy, "_check_delta", lambda original: lambda *given: None),
    ),
    "robust rules under the server's noise": (
        w.promises_that_cannot_be_kept_are_refused,
        wrapped(atoll.job.privacy, "_check_merging", lambda original: lambda job: None),
    ),
    "baselines without noise under a promise": (
        w.promises_that_cannot_be_kept_are_refused,
        wrapped(atoll.job.privacy, "_check_what_is_measured", lambda original: lambda job: None),
    ),
    "a secure sum of two": (
        w.promises_that_cannot_be_kept_are_refused,
        wrapped(atoll.job.privacy, "_check_secure_sums", lambda original: lambda job: None),
    ),
    "classes are listed from the data": (
        w.promises_that_cannot_be_kept_are_refused,
        wrapped(atoll.learning.compatibility, "check_info_stated", lambda original: lambda job, task: None),
    ),
}  # fmt: skip

SUMS: dict[str, Plant] = {
    "an audit's best guess at the noise is taken for its bound": wrapped(
        atoll.privacy.auditing.gaussian_sums, "least_noise_refuted",
        lambda original: lambda is_refuted, least, most, precision: 2 * least,
    ),
    "an audit counts a length for every release and the noise of one": wrapped(
        atoll.privacy.auditing.gaussian_sums, "chance",
        lambda original: lambda found, family, noise: original(found, family, noise * math.sqrt(family.releases)),
    ),
    "an audit takes the middle half's deviation for that of all scores": wrapped(
        atoll.privacy.auditing.gaussian_sums, "separation",
        lambda original: lambda scores, inside: dataclasses.replace(
            original(scores, inside), t=original(scores, inside).t / 0.7
        ),
    ),
    "an audit counts too few coins of sampling": wrapped(
        atoll.privacy.auditing.gaussian_sums, "binom",
        lambda original: SimpleNamespace(
            ppf=lambda p, n, q: original.ppf(p, n, q * 0.8),
            isf=lambda p, n, q: original.isf(p, n, q * 0.8),
            cdf=lambda k, n, q: original.cdf(k, n, q * 0.8),
        ),
    ),
}  # fmt: skip

OWN_COIN: dict[str, Plant] = {
    "an audit takes a canary's own part off as well": wrapped(
        atoll.sim.audit.example_canaries.CanaryFeatures, "_along",
        lambda original: lambda self, errors, features, moved, present: original(
            self, errors, features, moved, present
        )
        + self._expected_length * present * errors.square().sum(1) * features.square().sum(1),
    ),
}  # fmt: skip

BUGS: dict[str, tuple[Callable[[], None], Plant]] = {
    **{name: (w.a_client_moves_the_sum_by_the_clipping_norm, plant) for name, plant in CLIENT_SUMS.items()},
    **{
        name: (w.noise_at_the_server_does_not_depend_on_who_answers, plant)
        for name, plant in CLIENT_NOISE.items()
    },
    **{name: (w.noise_at_the_server_is_fresh, plant) for name, plant in FRESHNESS.items()},
    **{name: (w.the_servers_ledger_has_every_release, plant) for name, plant in SERVER_LEDGER.items()},
    **{name: (w.cohorts_are_what_they_are_charged_as, plant) for name, plant in SAMPLING.items()},
    **{
        name: (w.an_example_moves_a_heads_sum_by_the_clipping_norm, plant)
        for name, plant in EXAMPLE_SUMS.items()
    },
    **{
        name: (w.noise_at_a_client_is_in_every_step_and_tensor, plant)
        for name, plant in EXAMPLE_NOISE.items()
    },
    **{name: (w.noise_at_clients_is_fresh, plant) for name, plant in EXAMPLE_FRESHNESS.items()},
    **{name: (w.examples_are_drawn_by_coins, plant) for name, plant in EXAMPLE_SAMPLING.items()},
    **{name: (w.a_clients_ledger_has_every_release, plant) for name, plant in EXAMPLE_LEDGER.items()},
    **{
        name: (w.what_a_client_sends_beside_its_tensors_is_silent, plant)
        for name, plant in CLIENT_SILENCE.items()
    },
    **{name: (w.what_the_server_tells_is_silent, plant) for name, plant in SERVER_SILENCE.items()},
    **SECURE,
    **MODELS,
    **{name: (w.an_adaptive_norm_finds_the_norms_in_private, plant) for name, plant in ADAPTIVE.items()},
    **{name: (w.a_norm_of_examples_moves_in_private, plant) for name, plant in NORMS_OF_EXAMPLES.items()},
    **{name: (w.banded_noise_is_that_of_the_matrix, plant) for name, plant in BANDED_NOISE.items()},
    **{
        name: (w.a_client_moves_banded_releases_by_what_was_charged, plant)
        for name, plant in BANDED_CHARGES.items()
    },
    **{name: (w.a_clients_rounds_lie_bands_apart, plant) for name, plant in BANDED_COHORTS.items()},
    **{name: (w.releases_are_on_the_lattice, plant) for name, plant in LATTICE.items()},
    **ACCOUNTS,
    **{name: (w.a_bound_by_sums_is_seldom_above_the_truth, plant) for name, plant in SUMS.items()},
    **{name: (w.a_canarys_score_does_not_know_its_own_coin, plant) for name, plant in OWN_COIN.items()},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, plant = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(Detected):
        check()


@pytest.mark.parametrize("check", w.CHECKS, ids=lambda check: check.__name__)
def test_the_code_as_it_is_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("check", w.CHECKS, ids=lambda check: check.__name__)
def test_the_code_as_it_is_passes_twenty_times(check: Callable[[], None]) -> None:
    """Noise and coins are the operating system's, so that every time is another seed."""
    for _ in range(20):
        check()


def test_there_are_more_bugs_than_known_mistakes() -> None:
    assert len(BUGS) > 80
    assert {check for check, _ in BUGS.values()} == set(w.CHECKS)
