# SPDX-License-Identifier: Apache-2.0
"""A job's account with the privacy budget of the data that it trains on: what each round is charged, before it begins.

    ledger/NAME.jsonl, NAME.head     of [data.NAME] (:mod:`hansa.privacy.ledger`), beside site.toml; back both up

=========  =============================  ===========================================================================
dp-sgd     every round                    its steps, at the rate of this site's own number of examples
local      every round                    one release; data are replaced: half the noise multiplier
central    every round that is trained    the same; that others did not know of it is not counted on
dp-ftrl    once for all rounds            one release, in the same way; the server must ask as seldom as it says
=========  =============================  ===========================================================================

What a site tells beside updates is not charged: counts and labels of its data, and metrics on held-out data. Where a
budget is kept or a mechanism required, the pieces of a job are checked here too, whatever the server has checked, and
all but its training code must be Hansa's own. Training code of a signer whom the site trusts can do what it likes with
the data. In a simulation there are no ledgers: the data are the researcher's own.

| case | result |
|---|---|
| killed between charge and training, or while training | trained again, charged once |
| killed while a finished update is kept | perhaps charged twice; never once for two |
| the update was made from other than the examples that were charged | PolicyError; it stays here |
| the pieces of the job do not keep the promise; its noise can't be found | PolicyError, nothing charged |
| the ledger was tampered with | PolicyError; the agent's log says what was found |
| the certificate was renewed | the ledger's next head is signed with it |
| ... with a new key, and the old one no longer counts | tampered with, until `hansa site budget --seal NAME` |
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from hansa.core.config import Job
from hansa.core.fit import Trait, check_fit
from hansa.core.values import WEIGHT_SCALE
from hansa.errors import AccessError, FitError, PolicyError, PrivacyError
from hansa.pki import keys
from hansa.pki.identity import read_certificate
from hansa.pki.kit import Kit, verify
from hansa.privacy.accounting import Release
from hansa.privacy.ledger import Budget, Charge, Ledger, TamperedError
from hansa.privacy.plan import terms_of_job
from hansa.privacy.steps import noisy_steps
from hansa.runs.carrier import pieces_of
from hansa.workers.runner import Course

_LOG = logging.getLogger("hansa.site")

FOLDER = "ledger"

ALL_ROUNDS = "all rounds"


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

    def charge(self, job: Job, examples: int, task: str, round: int) -> None:
        """Charge a round, durably, before it is trained.

        Args:
            job: what was signed.
            examples: how many the site trains on.
            task: the task's name.
            round: its round.

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
            self._book.charge(Charge(self._digest, self._id, key, round, mechanism, unit, release), self._budget)
        except TamperedError as error:
            _LOG.error("%s", error.message)
            raise PolicyError(
                "The privacy ledger of the data is damaged; the site's owner has to look at it."
            ) from error

    def sent(self, job: Job, task: str, weight: float, examples: int) -> None:
        """Write down, durably, that a round's update may leave.

        Args:
            job: what was signed.
            task: the task's name.
            weight: the update's.
            examples: how many were charged.

        Raises:
            PolicyError: it was made from other examples.
            StorageError: the ledger can't be written, or was tampered with.
        """
        assert job.privacy is not None, "the site's policy was held"
        if job.privacy.mechanism == "dp-sgd" and round(weight * WEIGHT_SCALE) != examples:
            raise PolicyError(
                f"The update was made from {weight * WEIGHT_SCALE:g} examples, and {examples} were charged to the "
                "privacy budget. It was not sent."
            )
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
    return "user", Release(terms.noise_multiplier / 2)
