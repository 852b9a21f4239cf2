"""How much of a claimed epsilon one audited run proves: a line for each of twenty runs of other seeds.

The digits' jobs of `SETTINGS`, at one target epsilon. A run is attacked by `atoll audit`'s own code, whose
noise and coins are the operating system's. Seconds are those of the audit: playing the job with
canaries, and all bounds. Ends with status 1 if any run proves more than its claim, or a setting's
median proves less than asked for.

    python -m benchmarks.audit [--runs 20] [--epsilon 8] [--only NAME,...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.job.job import Job
from atoll.privacy.accounting import epsilon
from atoll.privacy.dp_plan import dp_plan_of
from atoll.sim.audit.audit import Audit, audited
from atoll.sim.population.population import Population

FRONTIER = Path(__file__).parents[1] / "jobs" / "digits-frontier.toml"
ASKED = 0.6
"""Of the claim: what a setting's median run is to prove."""
CLIENT: dict[str, Any] = {"unit": "client", "where": "server", "delta": 1e-5, "clipping_norm": 1.0}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "client": {"privacy": CLIENT, "federation": {"clients": 10, "rounds": 20}},
    "client-sampled": {
        "privacy": CLIENT,
        "federation": {"clients": 10, "rounds": 100, "cohort_rate": 0.3},
    },
    "example-distributed": {},
    "example-client": {"privacy": {"where": "client"}},
}
"""What a setting changes of the file; the privacy of another unit takes the place of the file's."""


@dataclass(frozen=True)
class Attacked:
    """What one run proved."""

    claimed: float
    one_run: float
    f_dp: float
    sums: float
    seconds: float

    @property
    def most(self) -> float:
        """The largest of the bounds."""
        return max(self.one_run, self.f_dp, self.sums)


def job_of(setting: Mapping[str, Any], seed: int, target: float) -> Job:
    """The file's job as the setting changes it, with that seed and that target epsilon."""
    table = tomllib.loads(FRONTIER.read_text("utf-8")) | {"seed": seed}
    privacy = setting.get("privacy", {})
    kept = {} if "unit" in privacy else table["privacy"]
    table["privacy"] = {**kept, **privacy, "epsilon": target}
    table["federation"] = setting.get("federation", table["federation"])
    table["evaluate"] = {"every": table["federation"]["rounds"]}
    return Job.parse(table, origin=str(FRONTIER))


def attack(job: Job) -> Attacked:
    """One audit of the job."""
    [unit] = job.privacy.units
    dp_plan = dp_plan_of(job, unit)
    assert dp_plan is not None
    claim = {"epsilon": epsilon(dp_plan.planned, dp_plan.delta), "releases": dp_plan.releases}
    began = time.perf_counter()
    found = audited(
        job, {"units": {unit: claim}}, Audit(), population=Population.of(job), watch=lambda done, plays: None
    )["units"][unit]
    seconds = time.perf_counter() - began
    one_run, f_dp, sums = (float(found[key]["epsilon"]) for key in ("one_run", "f_dp", "gaussian_sums"))
    return Attacked(float(claim["epsilon"]), one_run, f_dp, sums, seconds)


def table_of(name: str, runs: int, target: float) -> bool:
    """Print the runs of a setting; whether all stay below the claim and the median proves enough."""
    print(f"\n{name}\n  seed  claimed  one run   f-DP   sums  of it  seconds")
    found: list[Attacked] = []
    for seed in range(1, runs + 1):
        one = attack(job_of(SETTINGS[name], seed, target))
        found.append(one)
        print(
            f"{seed:>6}  {one.claimed:>7.2f}  {one.one_run:>7.2f}  {one.f_dp:>5.2f}  {one.sums:>5.2f}"
            f"  {one.sums / one.claimed:>5.0%}  {one.seconds:>7.1f}",
            flush=True,
        )
    parts = [one.sums / one.claimed for one in found]
    above = sum(one.most > one.claimed for one in found)
    middle = statistics.median(parts)
    print(
        f"of the claim: least {min(parts):.0%}, median {middle:.0%}, most {max(parts):.0%}; {above} above it"
    )
    return above == 0 and middle >= ASKED


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description="How much of a claim one audited run proves.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--only", default=",".join(SETTINGS))
    options = parser.parse_args()
    kept = [table_of(name, options.runs, options.epsilon) for name in options.only.split(",")]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
