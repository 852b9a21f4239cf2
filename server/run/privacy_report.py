"""A run's privacy claim: epsilon of all charged releases, and the assumptions on which it rests."""

from __future__ import annotations

import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from atoll.learning.objective.distillation import claim_of_teacher
from atoll.privacy.accounting import Composition, epsilon, epsilon_rdp
from atoll.privacy.banded import sensitivity_of
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.report.run_result import PrivacyClaim, RunPrivacy
from atoll.server.rounds.central_dp import NORM, CentralDp
from atoll.server.rounds.round_log import charged_rounds
from atoll.server.rounds.run_state import Run
from atoll.strategies.private_closed_form import SENSITIVITY

NO_PRIVACY: RunPrivacy = {
    "unit": "none", "epsilon": None, "delta": None, "accountant": None,
    "noise_multiplier": None, "clipping_norm": None, "where": None, "seeded_noise": None, "units": {},
}  # fmt: skip
RELATION = "add-or-remove-one"


def privacy_report(run: Run) -> RunPrivacy:
    """The `privacy` table of `result.json`; with two promises, the one with the larger epsilon comes first.

    An infinite epsilon is None, since JSON has no infinity.
    """
    privacy, ended_early = run.setup.job.privacy, run.state.ended_early or None
    units: dict[str, PrivacyClaim] = {unit: _of_unit(run, unit) for unit in privacy.units}
    if not units:
        return {**NO_PRIVACY}
    weakest = max(
        units.values(), key=lambda claim: math.inf if claim["epsilon"] is None else claim["epsilon"]
    )
    return {**weakest, "unit": privacy.unit, "units": units, "ended_early": ended_early}


def _of_unit(run: Run, unit: str) -> PrivacyClaim:
    job, protection = run.setup.job, run.setup.protection
    dp_plan = dp_plan_of(job, "client" if unit == "client" else "example")
    assert dp_plan is not None
    claim = claim_of(dp_plan, _spent(run, dp_plan), seeded_noise=job.privacy.seeded_noise)
    if job.tune.head_init is not None:
        assert job.tune.feature_norm is not None, "a closed form under a promise is refused without"
        claim["sums_of_features"] = {"feature_norm": job.tune.feature_norm, "sensitivity": SENSITIVITY}
    if dp_plan.promise.clipping == "adaptive" and dp_plan.unit == "client":
        norm = run.state.strategy_state.get(NORM)
        claim["last_clipping_norm"] = None if norm is None else float(norm)
    if dp_plan.where == "server" and isinstance(protection, CentralDp):
        with protection.ledger.alone():  # what other runs have charged until now is in it
            total = Counter(protection.ledger.spent)
        claim["epsilon_of_all_runs"] = _number(epsilon(total, dp_plan.delta))
    return claim if job.train.teacher is None else _with_teacher(claim, Path(job.train.teacher))


def _with_teacher(claim: PrivacyClaim, run: Path) -> PrivacyClaim:
    """The claim composed with the teacher's, since both were trained on the same clients' data.

    By basic composition (Dwork et al. 2006) epsilons and deltas add up.
    """
    other = claim_of_teacher(run, claim["unit"])
    assert other is not None, "a job under a promise is refused a teacher without one"
    epsilon, its = claim["epsilon"], other["epsilon"]
    return {
        **claim,
        "epsilon": _sum(epsilon, its),
        "epsilon_rdp": _sum(claim.get("epsilon_rdp"), other.get("epsilon_rdp")),
        "delta": claim["delta"] + other["delta"],
        "without_teacher": {"epsilon": epsilon, "delta": claim["delta"]},
        "teacher": {"epsilon": its, "delta": other["delta"]},
    }


def claim_of(dp_plan: DpPlan, spent: Composition, *, seeded_noise: bool) -> PrivacyClaim:
    """The claim for all releases in `spent`: epsilon together with its assumptions."""
    claim: PrivacyClaim = {
        "epsilon": _number(epsilon(spent, dp_plan.delta)),
        "epsilon_rdp": _number(epsilon_rdp(spent, dp_plan.delta)),
        "delta": dp_plan.delta,
        "accountant": f"PLD (dp-accounting {version('dp-accounting')})",
        "relation": RELATION,
        "sampler": sampler(dp_plan),
        "noise_multiplier": dp_plan.noise_multiplier,
        "releases": sum(spent.values()),
        "unit": dp_plan.unit,
        "where": dp_plan.where,
        "clipping_norm": dp_plan.promise.clipping_norm,
        "clipping": dp_plan.promise.clipping,
        "divisor": dp_plan.divisor,
        "target_epsilon": dp_plan.promise.epsilon,
        "seeded_noise": seeded_noise,
    }
    if dp_plan.bands > 1:  # correlated noise: the releases cost as one of this sensitivity, in norms
        claim["bands"] = dp_plan.bands
        claim["sensitivity"] = sensitivity_of(spent, dp_plan.noise_multiplier)
    return claim


def sampler(dp_plan: DpPlan) -> str:
    """A description of how units are sampled."""
    what = "examples" if dp_plan.unit == "example" else "clients"
    if dp_plan.bands > 1:
        return f"none that counts: all clients are charged, for one of any {dp_plan.bands} rounds in a row"
    if dp_plan.event.sampling_rate == 1:
        return f"none that counts: all {what} are charged for every release"
    return f"Poisson, each of the {what} with probability {dp_plan.event.sampling_rate:g}"


def _spent(run: Run, dp_plan: DpPlan) -> Composition:
    if dp_plan.where == "server":
        assert isinstance(run.setup.protection, CentralDp)
        return run.setup.protection.spent
    rounds = max(charged_rounds(run), _most_asked(run))
    return Counter({dp_plan.event: rounds * dp_plan.per_round})


def _most_asked(run: Run) -> int:
    """In how many of the run's rounds the client was asked that was asked most often.

    A client whose reply didn't arrive was charged for it and could not say so. Participants that are secret
    are not in the log: then the charged rounds are those that clients told.
    """
    return max(Counter(name for line in run.state.log for name in line["cohort"]).values(), default=0)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sum(one: float | None, its: float | None) -> float | None:
    return None if one is None or its is None else one + its
