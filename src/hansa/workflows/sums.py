# SPDX-License-Identifier: Apache-2.0
"""Sums that the server is shown without what they are of: by masks (``secure``), or encrypted (``homomorphic``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hansa.core.config import HomomorphicEncryptionSection, SecureAggregationSection
from hansa.core.ports import Cohort
from hansa.core.tree import Layout
from hansa.core.values import Plan
from hansa.errors import QuorumError
from hansa.privacy.plan import Terms
from hansa.workflows import homomorphic, secure
from hansa.workflows.secure import Sum


async def gather(
    section: SecureAggregationSection | HomomorphicEncryptionSection,
    private: Terms | None,
    cohort: Cohort,
    plan: Plan,
    asked: Sequence[str],
    expected: Mapping[str, Layout],
    weighed: Mapping[str, bool],
    scratch: Path,
) -> Sum:
    """Ask sites for a plan and return the sum of their answers.

    Args:
        section: the job's words on secret sums.
        private: the terms of its privacy plan.
        cohort: the sites.
        plan: what they are asked.
        asked: who is.
        expected: part -> layout of what is summed beside weight and metrics.
        weighed: which parts are multiplied by the weight.
        scratch: a folder that outlives a crash.

    Raises:
        QuorumError: too few answered in some phase; it names each and its reason.
        PrivacyError: terms that protect nobody, or a sum that nothing holds.
        FitError: encrypted, an update is larger than the job allows.
    """
    rest = (private, cohort, plan, asked, expected, weighed, scratch)
    session: secure.Session | homomorphic.Session
    if isinstance(section, HomomorphicEncryptionSection):
        session = homomorphic.Session(section, *rest)
    else:
        session = secure.Session(section, *rest)
    try:
        return await session.carry_out()
    except QuorumError as error:
        reasons = "\n".join(f"  {a.site}: {a.kind}: {a.reason}" for a in session.absent)
        raise QuorumError(f"{error.message}\n{reasons}".rstrip(), job=plan.job, round=plan.round) from error
