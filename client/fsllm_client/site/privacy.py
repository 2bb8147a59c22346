"""The budget before a release, and the release in the ledger before it leaves."""

from datetime import UTC, datetime

from fsllm_client.site.ledger import Accountant, Ledger, Release, Spent
from fsllm_client.site.policy import PlanNoise, Policy, Role, plan_noise
from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.algorithms import algorithm_class
from fsllm_common.plan import Plan


def trains(plan: Plan) -> bool:
    """Return whether the plan's algorithm trains, i.e. reads this site's data.

    Raises:
        PlanInvalid: The algorithm is not installed here.

    """
    return algorithm_class(plan.algorithm.name).needs_trainer


def part_in(plan: Plan, role: Role) -> Role:
    """Return what a member does in a run: an evaluator whose update the sites' are compared with trains as a site does.

    So its policy, its ledger and what it explains are those of a site.

    Raises:
        PlanInvalid: The algorithm is not installed here.

    """
    return "site" if algorithm_class(plan.algorithm.name).needs_trusted else role


def noise_of(plan: Plan, part: Role) -> PlanNoise | None:
    """Return the noise that releases of this member carry; None where nothing private is released with noise."""
    return plan_noise(plan) if part == "site" and trains(plan) else None


async def closed_form(multiplier: float, releases: int, delta: float) -> float:
    """Compute an epsilon without opacus, for forecasts before the trainer runs."""
    return epsilon_of(multiplier, releases, delta)


class PrivacyBudget:
    """What this site has spent, and may spend."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def refuse_plan(self, plan: Plan, run_id: str, policy: Policy, noise: PlanNoise) -> None:
        """Refuse a plan whose rounds, all together, pass the policy's bounds.

        Raises:
            PolicyRefused: POLICY_REFUSED.

        """
        done = sum(release.run_id == run_id for release in self._ledger.releases)
        spent = await self._ledger.forecast(
            closed_form, run_id, noise, releases=max(0, plan.rounds - done), delta=policy.privacy.delta
        )
        policy.refuse_epsilon(spent.run, spent.total, planned=True)

    async def refuse_release(self, accountant: Accountant, run_id: str, policy: Policy, noise: PlanNoise) -> Spent:
        """Return what one more release would bring the site to.

        Raises:
            PolicyRefused: BUDGET_SPENT.

        """
        spent = await self.forecast(accountant, run_id, policy, noise)
        policy.refuse_epsilon(spent.run, spent.total, planned=False)
        return spent

    async def forecast(self, accountant: Accountant, run_id: str, policy: Policy, noise: PlanNoise) -> Spent:
        """Return what one more release would bring the site to, without a judgement."""
        return await self._ledger.forecast(accountant, run_id, noise, releases=1, delta=policy.privacy.delta)

    def holds(self, run_id: str, round_: int, digest: bytes) -> bool:
        """Return whether this very release is on record."""
        return self._ledger.holds(run_id, round_, digest.hex())

    def record(self, plan: Plan, run_id: str, round_: int, digest: bytes, noise: PlanNoise, spent: Spent) -> None:
        """Put a release on record, durably; the same bytes again are the same release.

        Raises:
            Unavailable: DISK_FULL.

        """
        self._ledger.record(
            Release(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                run_id=run_id,
                run_name=plan.name,
                round=round_,
                digest=digest.hex(),
                clip_norm=noise.norm,
                multiplier=noise.multiplier,
                delta=noise.delta,
                epsilon=spent.run,
                epsilon_total=spent.total,
            )
        )
