# SPDX-License-Identifier: Apache-2.0
"""A job's account with the privacy budget of the data that it trains on: what each round is charged, before it begins.

    ledger/NAME.jsonl, NAME.head     of [data.NAME] (:mod:`hansa.privacy.ledger`), beside site.toml; back both up

=========  =============================  ===========================================================================
dp-sgd     every round                    its steps, at the rate of this site's own number of examples
local      every round                    one release; data are replaced: half the noise multiplier
central    every round that is trained    the same; that others did not know of it is not counted on
dp-ftrl    once for all rounds            one release, in the same way; asked more often than it says, the site refuses
distri-    every round that is trained    the same, with the noise of the fewest honest sites that the session allows;
buted                                     against all other sites, of a budget for that, this site's own share of it
=========  =============================  ===========================================================================

What a site tells beside updates is not charged: counts and labels of its data, and metrics on held-out data. Where a
budget is kept or a mechanism required, all pieces of a job but its training code must be Hansa's own. Whatever the
server has checked, every site checks that a job's pieces keep the privacy that it promises, and that it is asked no
more often than the promise allows. Training code of a signer whom the site trusts can do what it likes with the data.
In a simulation there are no ledgers: the data are the researcher's own.

| case | result |
|---|---|
| killed between charge and training, or while training | trained again, charged once |
| killed while a finished update is kept | perhaps charged twice; never once for two |
| killed once it is noted as the answer, before it is one | the same update is sent, charged once |
| another session of secure aggregation has begun since the charge | PolicyError; the update stays here |
| a turn of dp-ftrl that the plan does not have, or too soon after the last; the same after a restart | PolicyError |
| a central job with sampling asks here in more rounds than chance would, but for once in 2⁴⁰ | PolicyError; that |
| | others were asked more often, or this site a little less often than that, is not seen |
| more than ``privacy.epsilon`` of site.toml for one job | PolicyError, nothing is trained |
| the update was made from other than the examples that were charged | PolicyError; it stays here |
| the pieces of the job do not keep the promise; its noise can't be found | PolicyError, nothing charged |
| the ledger was tampered with | PolicyError; the agent's log says what was found |
| the certificate was renewed | the ledger's next head is signed with it |
| ... with a new key, and the old one no longer counts | tampered with, until `hansa site budget --seal NAME` |
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hansa.core.config import Job
from hansa.core.fit import Trait, check_fit
from hansa.core.values import WEIGHT_SCALE
from hansa.errors import AccessError, FitError, PolicyError, PrivacyError
from hansa.pki import keys
from hansa.pki.identity import read_certificate
from hansa.pki.kit import Kit, verify
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.ledger import Budget, Charge, Ledger, TamperedError
from hansa.privacy.plan import GRID, terms_of_job
from hansa.privacy.steps import noisy_steps
from hansa.runs.pieces import pieces_of
from hansa.workers.runner import Course

_LOG = logging.getLogger("hansa.site")

FOLDER = "ledger"

ALL_ROUNDS = "all rounds"

NEVER = 2.0**-40
"""A probability that a site need not reckon with."""


class KitSeal:
    """The seal of a site's kit."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def sign(self, data: bytes) -> tuple[bytes, str]:
        """Return a signature by the kit's key, and its certificate."""
        return self._kit.sign(data), self._kit.certificate_pem().decode()

    def check(self, data: bytes, signature: bytes, certificate: str) -> None:
        """Raise AccessError unless this site signed, with the key that it has or one that still counts."""
        pem = certificate.encode()
        verify(data, signature, pem)
        held, used = (read_certificate(each) for each in (self._kit.certificate_pem(), pem))
        if keys.public_bytes(held.public_key) != keys.public_bytes(used.public_key):
            who = self._kit.roster().admit(pem)
            if who.member != held.identity.member:
                raise AccessError(f"{who.member} signed it.")


def ledger(directory: Path, data: str, kit: Kit) -> Ledger:
    """Return the ledger of a data set of the site in ``directory``."""
    return Ledger(directory / FOLDER, data, KitSeal(kit))


def check_promise(job: Job, traits: Collection[Trait]) -> None:
    """Raise PolicyError unless a job's pieces keep the privacy that it promises; ``traits`` are its training code's.

    The server has checked the same, and this site need not believe it.
    """
    try:
        course = Course(job.name, (), job.strategy, tuple(job.filters), terms_of_job(job))
        check_fit(pieces_of(job, frozenset(traits), course))
    except (FitError, PrivacyError) as error:
        raise PolicyError(f"The job does not keep the privacy that it promises: {error.message}") from error


def draws_noise(job: Job) -> bool:
    """Say whether a site's update has noise of its own, which would be drawn anew where it is made again."""
    return job.privacy is not None and job.privacy.mechanism in ("local", "dp-sgd")


def check_turn(job: Job, before: Collection[int], round: int) -> None:
    """Raise PolicyError if this site is asked to train more often, or sooner again, than a job's promise allows.

    Args:
        job: what was signed.
        before: the rounds of the job that this site has trained.
        round: the one that it is asked for.
    """
    section = job.privacy
    rounds = {*before, round}
    if section is None:
        return
    if section.mechanism == "dp-ftrl":
        near = [other for other in before if 0 < abs(other - round) < section.separation]
        if near:
            raise PolicyError(
                f"The server asks for round {round}, and this site has trained round {near[0]}: dp-ftrl's noise is "
                f"made for turns {section.separation} rounds apart."
            )
        if section.participations is not None and len(rounds) > section.participations:
            raise PolicyError(
                f"The server asks for round {round}, and this site has trained {len(before)} of the "
                f"{section.participations} that dp-ftrl's noise is made for."
            )
    rate = job.cohort.sample
    if section.mechanism == "central" and isinstance(rate, float) and _chance(len(rounds), max(rounds), rate) < NEVER:
        raise PolicyError(
            f"The server has asked this site in {len(rounds)} of {max(rounds)} rounds, and the job draws it with "
            f"probability {rate:g}: cohorts are not drawn as its promise assumes."
        )


def _chance(times: int, rounds: int, rate: float) -> float:
    """Return a bound on the probability of being drawn so many times or more (Chernoff; Hoeffding 1963, Theorem 1)."""
    share = times / rounds
    if share <= rate:
        return 1.0
    rest = 0.0 if share == 1 else (1 - share) * math.log((1 - share) / (1 - rate))
    return math.exp(-rounds * (share * math.log(share / rate) + rest))


def check_epsilon(job: Job, examples: int, most: float, delta: float) -> None:
    """Raise PolicyError unless the whole of a job spends at most ``most`` at ``delta`` of this site's data."""
    assert job.privacy is not None, "the site's policy was held"
    try:
        _, one = _release(job, examples)
    except PrivacyError as error:
        raise PolicyError(error.message) from error
    times = 1 if job.privacy.mechanism == "dp-ftrl" else job.rounds
    spent = epsilon([replace(one, count=times * one.count)], delta)
    if spent > most:
        raise PolicyError(
            f"The job would spend ε = {spent:.4g} at δ = {delta:g} here; this site accepts at most {most:g} of one job."
        )


def check_examples(job: Job, weight: float, examples: int) -> None:
    """Raise PolicyError if an update under dp-sgd was made from other examples than its noise was measured for."""
    if job.privacy is not None and job.privacy.mechanism == "dp-sgd" and round(weight * WEIGHT_SCALE) != examples:
        raise PolicyError(
            f"The update was made from {weight * WEIGHT_SCALE:g} examples, and the site has {examples}, which its "
            "noise and its charge are for. It was not sent."
        )


def kept(directory: Path) -> list[str]:
    """Return the data sets of which the site in ``directory`` has a ledger."""
    return sorted(path.stem for path in (directory / FOLDER).glob("*.head"))


class Account:
    """One job's account with one budget.

    Args:
        book: the data set's ledger.
        budget: what is allowed.
        digest: the digest of what was signed.
        id: the job's id.
    """

    def __init__(self, book: Ledger, budget: Budget, digest: str, id: str) -> None:
        self._book = book
        self._budget = budget
        self._digest = digest
        self._id = id

    def charge(self, job: Job, examples: int, task: str, round: int, honest: int | None = None) -> None:
        """Charge a round, durably, before it is trained.

        Args:
            job: what was signed.
            examples: how many the site trains on.
            task: the task's name.
            round: its round.
            honest: of distributed noise, how many sites' shares make it up.

        Raises:
            PolicyError: the budget does not allow it, no noise gives the job's ε, or the ledger was tampered with.
            StorageError: the ledger can't be written.
        """
        try:
            unit, release = _release(job, examples)
        except PrivacyError as error:
            raise PolicyError(error.message) from error
        assert job.privacy is not None, "the site's policy was held"
        mechanism = job.privacy.mechanism
        key = ALL_ROUNDS if mechanism == "dp-ftrl" else task
        try:
            asked = Charge(self._digest, self._id, key, round, mechanism, unit, release, honest)
            self._book.charge(asked, self._budget)
        except TamperedError as error:
            _LOG.error("%s", error.message)
            raise PolicyError(
                "The privacy ledger of the data is damaged; the site's owner has to look at it."
            ) from error

    def sent(self, job: Job, task: str) -> None:
        """Write down, durably, that a round's update may leave.

        Args:
            job: what was signed.
            task: the task's name.

        Raises:
            StorageError: the ledger can't be written, or was tampered with.
        """
        assert job.privacy is not None, "the site's policy was held"
        if job.privacy.mechanism != "dp-ftrl":
            self._book.sent(self._digest, task)


def _release(job: Job, examples: int) -> tuple[Literal["example", "user"], Release]:
    """Return whom a round hides, and what it releases to somebody who knows that it was trained."""
    if (begin := noisy_steps(job)) is not None:
        if not examples:
            raise PrivacyError("The site has no examples to train on.")
        steps = begin(examples)
        return "example", Release(steps.terms.noise_multiplier, steps.terms.rate, steps.count)
    terms = terms_of_job(job)
    assert terms is not None, "the site's policy was held"
    grid = 2 * GRID if terms.section.mechanism == "distributed" else math.inf
    return "user", Release(terms.noise_multiplier / 2, grid=grid)
