"""What a run may claim of privacy: epsilon of what was charged, and all that it rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atoll.learning.distillation import claim_of_teacher
from atoll.privacy.accounting import Composition, epsilon, epsilon_rdp
from atoll.privacy.banded import sensitivity_of
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.server.rounds.central_dp import NORM, CentralDp
from atoll.server.rounds.round_log import charged_rounds
from atoll.server.rounds.run_state import Run
from atoll.strategies.private_closed_form import SENSITIVITY

NO_PRIVACY: Mapping[str, Any] = {
    "unit": "none", "epsilon": None, "delta": None, "accountant": None,
    "noise_multiplier": None, "clipping_norm": None, "where": None, "seeded_noise": None, "units": {},
}  # fmt: skip
RELATION = "add-or-remove-one"


def privacy_report(run: Run) -> dict[str, Any]:
    """The `privacy` of `result.json`; with two promises, the headline is the one with the larger epsilon.

    An infinite epsilon is None: no number stands for it.
    """
    privacy, ended_early = run.setup.job.privacy, run.state.ended_early or None
    units = {unit: _of_unit(run, unit) for unit in privacy.units}
    if not units:
        return dict(NO_PRIVACY)
    weakest = max(
        units.values(), key=lambda claim: math.inf if claim["epsilon"] is None else claim["epsilon"]
    )
    return {**weakest, "unit": privacy.unit, "units": units, "ended_early": ended_early}


def _of_unit(run: Run, unit: str) -> dict[str, Any]:
    job, protection = run.setup.job, run.setup.protection
    dp_plan = dp_plan_of(job, "client" if unit == "client" else "example")
    assert dp_plan is not None
    claim = {
        **spending(dp_plan, _spent(run, dp_plan)),
        "unit": dp_plan.unit,
        "where": dp_plan.where,
        "clipping_norm": dp_plan.promise.clipping_norm,
        "clipping": dp_plan.promise.clipping,
        "divisor": dp_plan.divisor,
        "target_epsilon": dp_plan.promise.epsilon,
        "seeded_noise": job.privacy.seeded_noise,
    }
    if job.tune.head_init is not None:
        claim["sums_of_features"] = {"feature_norm": job.tune.feature_norm, "sensitivity": SENSITIVITY}
    if dp_plan.promise.clipping == "adaptive":
        claim["last_clipping_norm"] = run.state.strategy_state.get(NORM)
    if dp_plan.where == "server" and isinstance(protection, CentralDp):
        with protection.ledger.alone():  # what other runs have charged until now is in it
            total = Counter(protection.ledger.spent)
        claim["epsilon_of_all_runs"] = _number(epsilon(total, dp_plan.delta))
    return claim if job.train.teacher is None else _with_teacher(claim, Path(job.train.teacher))


def _with_teacher(claim: dict[str, Any], run: Path) -> dict[str, Any]:
    """The claim with the teacher's added: who saw the same clients' data has composed both releases.

    Basic composition (Dwork et al. 2006): epsilons and deltas add up, whatever was drawn.
    """
    other = claim_of_teacher(run, claim["unit"])
    assert other is not None, "a job under a promise is refused a teacher without one"
    own, its = claim["epsilon"], other["epsilon"]
    total = None if own is None or its is None else own + its
    loose = (claim["epsilon_rdp"], other.get("epsilon_rdp"))
    return claim | {
        "epsilon": total,
        "epsilon_rdp": None if None in loose else sum(loose),
        "delta": claim["delta"] + other["delta"],
        "without_teacher": {"epsilon": own, "delta": claim["delta"]},
        "teacher": {"epsilon": its, "delta": other["delta"]},
    }


def spending(dp_plan: DpPlan, spent: Composition) -> dict[str, Any]:
    """Epsilon of what was spent, never without what it rests on."""
    return {
        "epsilon": _number(epsilon(spent, dp_plan.delta)),
        "epsilon_rdp": _number(epsilon_rdp(spent, dp_plan.delta)),
        "delta": dp_plan.delta,
        "accountant": f"PLD (dp-accounting {version('dp-accounting')})",
        "relation": RELATION,
        "sampler": sampler(dp_plan),
        "noise_multiplier": dp_plan.noise_multiplier,
        "releases": sum(spent.values()),
        **_of_bands(dp_plan, spent),
    }


def _of_bands(dp_plan: DpPlan, spent: Composition) -> dict[str, Any]:
    """What a claim of correlated noise rests on: the releases cost as one of this sensitivity, in norms."""
    if dp_plan.bands == 1:
        return {}
    return {"bands": dp_plan.bands, "sensitivity": sensitivity_of(spent, dp_plan.noise_multiplier)}


def sampler(dp_plan: DpPlan) -> str:
    """How units are drawn, in words."""
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
    return Counter({dp_plan.event: charged_rounds(run) * dp_plan.per_round})


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
