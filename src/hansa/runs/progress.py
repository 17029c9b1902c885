# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run works: stages, their steps, and messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hansa.core.ports import Cohort, Handle, Reply, SecureLine
from hansa.core.values import Plan, RoundRecord


class Progress(Protocol):
    """Shows progress; every method returns at once."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of ``total`` steps (0 where that isn't known), ``done`` of them done by an earlier attempt."""
        ...

    def advance(self, detail: str = "") -> None:
        """Count one step of the current stage."""
        ...

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        """Sites have been asked to carry a plan out."""
        ...

    def reply(self, plan: Plan, reply: Reply) -> None:
        """A site has answered."""
        ...

    def round(self, record: RoundRecord) -> None:
        """A round is over and on disk."""
        ...

    def doing(self, site: str, text: str) -> None:
        """Tell what a site that is far away is at now; nothing if ``text`` is empty."""
        ...

    def say(self, text: str) -> None:
        """Tell something once."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Show nothing."""

    def advance(self, detail: str = "") -> None:
        """Show nothing."""

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        """Show nothing."""

    def reply(self, plan: Plan, reply: Reply) -> None:
        """Show nothing."""

    def round(self, record: RoundRecord) -> None:
        """Show nothing."""

    def doing(self, site: str, text: str) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Watched:
    """A cohort whose replies are shown as they come."""

    cohort: Cohort
    progress: Progress

    @property
    def sites(self) -> Sequence[str]:
        """The cohort's sites."""
        return self.cohort.sites

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Ask, and show who is asked and each reply."""
        self.progress.ask(plan, sites)
        async for reply in self.cohort.ask(plan, sites):
            self.progress.reply(plan, reply)
            yield reply
            del reply  # or it would be held while the next site trains

    def late(self, round: int) -> Sequence[Handle]:
        """Return what came late."""
        return self.cohort.late(round)

    @property
    def secure(self) -> SecureLine | None:
        """The cohort's way of secure aggregation's messages."""
        return self.cohort.secure

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums into metrics."""
        return await self.cohort.summarise(sums)
