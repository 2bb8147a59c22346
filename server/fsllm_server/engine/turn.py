"""One decision in the making: the state so far and the effects so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fsllm_server.engine.effects import ClearTimer, Effect, Notify, SendOrder, SetTimer, WithdrawOrder
from fsllm_server.engine.events import Metric
from fsllm_server.engine.state import Commit, Kind, Order, Run, Standing, Status, Timer, Version

RETRY: str = "retry:"
"""Timers of this prefix belong to a member and outlive a phase."""


class Turn:
    """What phases work with: each method replaces ``run`` and adds to ``effects``. Lives for one event."""

    def __init__(self, run: Run, at: float) -> None:
        self.run = run
        self.at = at
        self.effects: list[Effect] = []

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Run; dataclasses.replace checks the names
        """Replace fields of the run."""
        self.run = replace(self.run, **changes)

    def update_member(self, name: str, **changes: Any) -> None:  # noqa: ANN401 - fields of Member
        """Replace fields of a member."""
        members = dict(self.run.members)
        members[name] = replace(members[name], **changes)
        self.update(members=members)

    def issue(self, what: str) -> str:
        """Return a name that this run has never used."""
        self.update(issued=self.run.issued + 1)
        # What a restored run has given out before is known to its members, but no longer to its log.
        epoch = f"-{self.run.epoch}" if self.run.epoch else ""
        return f"{self.run.id}.{self.run.round}.{what}.{self.run.issued}{epoch}"

    # Orders.

    def send(self, member: str, kind: Kind, base: Version | None = None) -> None:
        """Open an order and send it."""
        view = base.view(self.run.members[member].rank) if base is not None else None
        order = Order(self.issue(f"{kind}.{member}"), member, self.run.round, kind, view)
        self.update(orders={**self.run.orders, order.id: order})
        self.effects.append(SendOrder(order))

    def close(self, order: Order) -> None:
        """An order has been answered."""
        self.update(orders={key: value for key, value in self.run.orders.items() if key != order.id})

    def withdraw(self, order: Order, reason: str, message: str) -> None:
        """Close an order and tell its member to drop it."""
        self.close(order)
        self.effects.append(WithdrawOrder(order.member, order.id, reason, message))

    def withdraw_all(self, reason: str, message: str, *kinds: Kind) -> None:
        """Withdraw the open orders of these kinds; of all when none is named."""
        for order in list(self.run.orders.values()):
            if not kinds or order.kind in kinds:
                self.withdraw(order, reason, message)

    def nudge(self, name: str) -> None:
        """Send an attached member the order that brings it towards READY, unless it has one."""
        run, member = self.run, self.run.members[name]
        if not run.active or not member.attached or run.orders_of(name):
            return
        if member.standing is Standing.OFFERED:
            self.update_member(name, idle=False)  # a new offer is waited for anew
            self.send(name, Kind.JOIN)
        elif member.standing is Standing.JOINED and run.zero is not None:
            self.send(name, Kind.CHECK, run.zero)

    def nudge_all(self) -> None:
        """Nudge every member, in the order of their names."""
        for name in sorted(self.run.members):
            self.nudge(name)

    # Timers.

    def set_timer(self, purpose: str, seconds: float) -> None:
        """Start a timer, in place of one for the same purpose."""
        self.clear_timer(purpose)
        timer = Timer(self.issue(purpose), seconds)
        self.update(timers={**self.run.timers, purpose: timer}, overdue=self.run.overdue - {purpose})
        self.effects.append(SetTimer(timer.id, seconds))

    def clear_timer(self, purpose: str) -> None:
        """Stop a timer, if it runs."""
        if (timer := self.run.timers.get(purpose)) is not None:
            self.update(timers={key: value for key, value in self.run.timers.items() if key != purpose})
            self.effects.append(ClearTimer(timer.id))

    def clear_timers(self, *, retries: bool = False) -> None:
        """Stop the phase's timers, and those of the members too when ``retries``."""
        for purpose in list(self.run.timers):
            if retries or not purpose.startswith(RETRY):
                self.clear_timer(purpose)
        self.update(overdue=frozenset())

    # The run as a whole.

    def notify(
        self,
        kind: str,
        subject: str,
        message: str,
        *,
        metrics: tuple[Metric, ...] = (),
        commit: Commit | None = None,
    ) -> None:
        """Tell those who watch."""
        self.effects.append(Notify(self.run.round, kind, subject, message, metrics, commit))

    def fail(self, failure: str) -> str:
        """Note why the attempt failed and return the phase that deals with it."""
        self.update(failure=failure)
        return "failed"

    def bank_time(self) -> None:
        """Add the time since the phase began (or was banked last) to the round's account."""
        run = self.run
        spent = run.phase_seconds.get(run.phase, 0.0) + max(0.0, self.at - run.phase_since)
        self.update(phase_seconds={**run.phase_seconds, run.phase: spent}, phase_since=self.at)

    def pause(self, reason: str, message: str) -> None:
        """Stop deciding until somebody resumes the run; what is recorded stays."""
        self.bank_time()
        self.withdraw_all("RUN_PAUSED", message)
        self.clear_timers(retries=True)
        self.update(status=Status.PAUSED, reason=reason, message=message)
        self.notify("status", Status.PAUSED, message)

    def end(self, status: Status, reason: str, message: str) -> None:
        """End the run."""
        self.withdraw_all(reason, message)
        self.clear_timers(retries=True)
        self.update(status=status, reason="", message=message, phase="")
        self.notify("status", status, message)
