# SPDX-License-Identifier: Apache-2.0
"""Sums that the server is shown without what they are of: by masks (``secure``), or encrypted (``homomorphic``)."""

from __future__ import annotations

from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.ports import Cohort
from hansa.errors import FitError, QuorumError
from hansa.workflows import homomorphic, secure
from hansa.workflows.secure import Question, Sum


async def gather(question: Question, cohort: Cohort) -> Sum:
    """Ask sites for a plan and return the sum of their answers.

    Where a cohort's sites are simulated and their job is masked by default only, nothing is to be hidden from anybody:
    they answer in the open, and what they would have masked is added up in the same ring. So the sum has the same bits.

    Raises:
        QuorumError: too few answered in some phase; it names each and its reason.
        PrivacyError: terms that protect nobody, or a sum that nothing holds.
        FitError: encrypted, an update is larger than the job allows; or there is no way to the sites for the messages.
    """
    section, line = question.section, cohort.secure
    for late in cohort.late(question.plan.round):
        late.release()  # a sum that it could be in is made already
    session: secure.Session | homomorphic.Session | secure.Openly
    if isinstance(section, HomomorphicEncryptionSection):
        session = homomorphic.Session(question, section, cohort)
    elif line is None and section.by_default:
        session = secure.Openly(question, section, cohort)
    elif line is None:
        raise FitError("Secure aggregation has no way to the sites here.", job=question.plan.job)
    else:
        session = secure.Session(question, section, cohort, line, await line.attempts(question.plan))
    try:
        return await session.carry_out()
    except QuorumError as error:
        reasons = "\n".join(f"  {a.site}: {a.kind}: {a.reason}" for a in session.absent)
        raise QuorumError(
            f"{error.message}\n{reasons}".rstrip(), job=question.plan.job, round=question.plan.round
        ) from error
