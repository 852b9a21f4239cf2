"""The privacy ledgers of this process's clients, one each, charged before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from atoll.errors import BudgetExhausted
from atoll.job.job import Job
from atoll.kit.kit import Budget
from atoll.privacy.accounting import compose, within
from atoll.privacy.dp_plan import DpPlan
from atoll.privacy.ledger import Entry, Ledger
from atoll.protocol.requests import Request


@dataclass
class PrivacyLedgers:
    """The ledgers of all clients by unit, in one folder; they last beyond runs and jobs."""

    folder: Path
    budget: Budget | None = None
    _open: dict[str, Ledger] = field(default_factory=dict)

    def charge(self, client: str, fingerprint: str, job: Job, dp_plan: DpPlan, request: Request) -> int:
        """Charge one round, and return how many rounds of this run have been charged by then.

        A round that is answered again, because its update was lost, is charged again; only with seeded noise,
        which repeats the same bytes, it is not.

        Raises:
            BudgetExhausted: the round would exceed the run's target epsilon or the site's budget.
            DataError: the ledger's file was tampered with.
        """
        durable = not job.privacy.seeded_noise
        ledger = self.ledger(client, dp_plan.unit, durable=durable)
        with ledger.alone():
            if durable or not ledger.has(request.run, request.round):
                self._check_target(ledger, dp_plan, request.run)
                if durable:
                    self._check_budget(ledger, dp_plan)
                ledger.charge(
                    Entry(
                        request.run, request.round, dp_plan.unit, dp_plan.event, dp_plan.per_round,
                        fingerprint,
                    )
                )  # fmt: skip
            return sum(ledger.spent_on(request.run).values()) // dp_plan.per_round

    def _check_target(self, ledger: Ledger, dp_plan: DpPlan, run: str) -> None:
        if not dp_plan.within_budget(ledger.spent_on(run), dp_plan.per_round):
            raise BudgetExhausted(
                f"one more round would bring epsilon above the target {dp_plan.promise.epsilon}"
            )

    def _check_budget(self, ledger: Ledger, dp_plan: DpPlan) -> None:
        if self.budget is None:
            return
        everything = compose(ledger.spent, {dp_plan.event: dp_plan.per_round})
        if not within(everything, self.budget.delta, self.budget.epsilon):
            raise BudgetExhausted("the site's privacy budget for this client's data is spent")

    def ledger(self, client: str, unit: str, *, durable: bool = True) -> Ledger:
        """The client's ledger for one unit, opened when first needed."""
        name = client if unit == "example" else f"{client}.{unit}"
        if name not in self._open:
            path = self.folder / f"{name}.jsonl"
            self._open[name] = Ledger.open(path, f"{unit} of {client}", durable=durable)
        return self._open[name]
