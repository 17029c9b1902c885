# SPDX-License-Identifier: Apache-2.0
"""What is done at a site: plans carried out under a course, in this process or in a worker."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hansa import registry
from hansa.client.work import perform
from hansa.core.config import (
    Algorithm,
    Choice,
    EngineSection,
    HomomorphicEncryptionSection,
    PrivacySection,
    SecureAggregationSection,
)
from hansa.core.filter import Filter
from hansa.core.fit import Trait
from hansa.core.ports import SERVER, Phase, Program
from hansa.core.strategy import Strategy
from hansa.core.values import Absence, Plan, Task, Update
from hansa.errors import HansaError
from hansa.filters.weigh import weigh
from hansa.privacy.draws import Secret
from hansa.privacy.plan import Terms
from hansa.privacy.protect import bounded, protected
from hansa.robust.defend import defended
from hansa.workers.memory import Mailboxes, MemoryStore
from hansa.workers.messages import TermsForm


@dataclass(frozen=True)
class Course:
    """A training course over some sites: the job itself, or one of its baselines.

    Attributes:
        name: what plans of this course carry as their job.
        sites: who takes part.
        strategy: its name and options, or the value itself (engines in this process only).
        filters: the same, in order; the weighing that every course has is added.
        terms: the privacy plan that it is under, if any.
        secure: the words on secret sums, where updates leave masked or encrypted.
    """

    name: str
    sites: tuple[str, ...]
    strategy: Choice | Strategy
    filters: tuple[Choice | Filter, ...] = ()
    terms: Terms | None = None
    secure: SecureAggregationSection | HomomorphicEncryptionSection | None = None

    def pieces(self, secret: Secret | None = None) -> tuple[Strategy, list[Filter]]:
        """Return the strategy and the filters as values.

        Args:
            secret: what protective draws at the server come from, where they are to be made.
        """
        strategy = (
            registry.build("strategies", self.strategy.name, self.strategy.options)
            if isinstance(self.strategy, Choice)
            else self.strategy
        )
        if isinstance(self.strategy, Algorithm) and self.strategy.robust is not None:
            strategy = defended(strategy, self.strategy.robust)
        chosen: list[Filter] = [
            registry.build("filters", item.name, item.options) if isinstance(item, Choice) else item
            for item in self.filters
        ]
        place = next((i for i, piece in enumerate(chosen) if Trait.CLIPS not in piece.traits), len(chosen))
        if self.terms is None:
            return strategy, [*chosen[:place], weigh(), *chosen[place:]]
        private = protected(strategy, self.terms, secret)
        return private, [*chosen[:place], bounded(self.terms), weigh(), *chosen[place:]]


def form_of(terms: Terms | None) -> TermsForm | None:
    """Return a plan's terms as a worker is told them."""
    return None if terms is None else TermsForm(terms.section.model_dump(mode="json"), terms.rounds, terms.rate)


def terms_from(form: TermsForm | None) -> Terms | None:
    """Return the terms that a worker was told."""
    return None if form is None else Terms(PrivacySection.model_validate(form.section), form.rounds, form.rate)


SECURE = "secagg"
"""The folder, in that of a simulation, in which its sites keep what secure aggregation needs."""


class SecureSites:
    """The sites' sides of secret sums, as far as they are played here.

    What it does needs the extra that has ``cryptography``, and is loaded when it is first used.

    Args:
        directory: where their states are.
        simulated: whether the sites are simulated here, identities and all; a deployed site's agent has its own.
    """

    def __init__(self, directory: Path, *, simulated: bool) -> None:
        self._directory = directory
        self._simulated = simulated

    def exchange(self, course: Course, phase: Phase, letters: Mapping[str, bytes]) -> dict[str, bytes | Absence]:
        """Answer messages, site by site; what goes wrong at one is its absence."""
        sessions = self._sessions(course)
        answers: dict[str, bytes | Absence] = {}
        for site, letter in letters.items():
            try:
                answers[site] = sessions.exchange(course, site, phase, letter)
            except HansaError as error:
                answers[site] = Absence(site, "refused", error.message)
        return answers

    def masked(self, course: Course, update: Update, task: Task) -> Update:
        """Return ``update`` masked or encrypted.

        Raises:
            HansaError: it can't be masked; nothing of it is to be sent.
        """
        masked: Update = self._sessions(course).masked(course, update, task)
        return masked

    @property
    def checker(self) -> Any:
        """What tells the sites' signatures."""
        return self._identity(SERVER)

    def _identity(self, site: str) -> Any:
        if self._simulated:
            return registry.load_object("hansa.workers.secure:simulated")(self._directory, site)
        return registry.load_object("hansa.workers.secure:Stored")()

    def _sessions(self, course: Course) -> Any:
        assert course.secure is not None, "the course keeps its updates from the server"
        encrypted = isinstance(course.secure, HomomorphicEncryptionSection)
        module = "homomorphic" if encrypted else "secure"
        return registry.load_object(f"hansa.workers.{module}:Sessions")(self._directory, self._identity)


@dataclass(frozen=True)
class SimulatedLine:
    """The way of secure aggregation's messages to sites on this machine."""

    sites: SecureSites
    course: Course

    @property
    def checker(self) -> Any:
        """Whose signatures count."""
        return self.sites.checker

    @property
    def scope(self) -> str:
        """Nothing: a folder has one job."""
        return ""

    async def attempts(self, plan: Plan) -> int:
        """Return 0: a state that is lost here is lost with the sites' own."""
        return 0

    async def exchange(self, plan: Plan, phase: Phase, letters: Mapping[str, bytes]) -> dict[str, bytes | Absence]:
        """Answer messages, site by site."""
        return await asyncio.to_thread(self.sites.exchange, self.course, phase, letters)


class SiteRunner:
    """Carries plans out at sites: one instance in this process, or one in every worker.

    Args:
        program: the job's training code.
        directory: for what sites remember, their mail, and tracebacks.
        fatal: errors that are raised; all others are a site's own, and make it absent.
        secure: where a deployed site's agent keeps the states of secure aggregation; None where sites are simulated.
    """

    def __init__(
        self,
        program: Program,
        directory: Path,
        *,
        fatal: tuple[type[Exception], ...] = (),
        secure: Path | None = None,
    ) -> None:
        self.program = program
        self._fatal = fatal
        self._memory = MemoryStore(directory / "memory")
        self._mail = Mailboxes(directory / "mail")
        self._errors = directory / "errors"
        self.secure = SecureSites(secure or directory / SECURE, simulated=secure is None)
        self._pieces: dict[str, tuple[Course, Strategy, list[Filter]]] = {}

    def run(self, course: Course, plan: Plan, site: str) -> Update | Absence:
        """Do ``plan`` at ``site``; whatever goes wrong there is an absence, with its reason."""
        begun = time.perf_counter()
        try:
            update = self._run(course, plan, site)
        except self._fatal:
            raise
        except HansaError as error:
            return Absence(site, "refused", error.message)
        except (Exception, SystemExit) as error:  # one site's failure must not end the job
            if is_out_of_memory(error) and MemoryError in self._fatal:
                raise MemoryError(str(error)) from error
            return Absence(site, "lost", self._log(site, plan, error))
        return replace(update, seconds=max(0.0, time.perf_counter() - begun))

    def _pieces_of(self, course: Course) -> tuple[Strategy, list[Filter]]:
        if course.name not in self._pieces or self._pieces[course.name][0] != course:
            self._pieces[course.name] = (course, *course.pieces())
        return self._pieces[course.name][1:]

    def _run(self, course: Course, plan: Plan, site: str) -> Update:
        strategy, filters = self._pieces_of(course)
        if plan.inbox is not None:
            plan = replace(plan, params=self._mail.take(site, plan.inbox, plan.round)["params"])
        accepted = plan.acknowledged.get(site)
        memory = self._memory.load(course.name, site, accepted) if plan.task == "train" else {}
        update, memory, params = perform(self.program, strategy, filters, plan, site, memory)
        if plan.task == "train":
            self._memory.save(course.name, site, plan.round, memory, accepted)
        if plan.outbox is not None:
            self._mail.put(site, plan.outbox, plan.round, {"params": params})
            update = replace(update, parts={})
        if course.secure is not None:
            return self.secure.masked(course, update, plan.task)
        return update

    def _log(self, site: str, plan: Plan, error: BaseException) -> str:
        self._errors.mkdir(parents=True, exist_ok=True)
        path = self._errors / trace_name(plan.job, site, plan.round)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f"{type(error).__name__}: {error}{trace_note(path)}"


def trace_name(course: str, site: str, round: int) -> str:
    """Return the name, in the folder ``errors``, of the traceback of what a site met in a round."""
    return f"{course}.{site}.{round:06d}.txt"


def trace_note(path: Path) -> str:
    """Return how a reason ends whose traceback is in ``path``."""
    return f" (traceback in {path})"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; torch's are a RuntimeError, on the CPU told by its text only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def num_threads(section: EngineSection, site: str | None) -> int:
    """Return how many CPU threads ``site`` trains with (None: what no site does); they are part of the result."""
    own = section.sites.get(site) if site else None
    return (own and own.cpus) or section.threads


def pin_threads(count: int) -> None:
    """Make torch, where it is loaded, use ``count`` CPU threads in the calling thread, whatever the machine has."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
