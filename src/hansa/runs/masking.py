# SPDX-License-Identifier: Apache-2.0
"""Whether a job's updates are masked, where the job does not say: settled once, where it is prepared.

A submission is prepared at its submitter, who signs the outcome: server and sites read a table of the job that says on
or off, so no server can leave masks out. A simulation is prepared where it runs, and comes to the same outcome, so the
same job has the same bits.

On, for more than two sites, unless

| there is | masks would |
|---|---|
| a piece that does not compose with them (``hansa.core.fit``, trait MASKED) | be refused |
| a round of fewer sites than the least that is summed | end the job |
| [homomorphic_encryption] | do its work twice |
| [privacy] | hide what it counts on: see ``_PRIVATE`` |
| a strategy, workflow, filter or recipe of one's own | sum what nobody can tell the ranges of |

and then the reason stands in the job. To a table of the job's own, the metrics that its recipe declares are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hansa import registry
from hansa.core.config import Choice, Job, SecureAggregationSection
from hansa.core.fit import Trait
from hansa.errors import PrivacyError
from hansa.runs.pieces import misfits, relays
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import wanted
from hansa.workflows.secure import quorum_of

_SERVER = "the server holds each update to [privacy]'s clip, and can't see its length under masks"
_PRIVATE: Mapping[str, str] = {
    "central": _SERVER,
    "dp-ftrl": _SERVER,
    "dp-sgd": "a site's privacy budget is held against the number of examples, which masks hide",
    "local": "local noise may be larger than any range",
    "distributed": "what distributed noise promises rests on a table that the job itself gives",
}


def prepared(job: Job, federation: Sequence[str]) -> Job:
    """Return the job as it is to be signed: settled, and naming its sites where these hand the model to each other.

    Args:
        job: the job.
        federation: all sites; who takes part, if the job does not say.
    """
    sites = sorted(job.cohort.sites or federation)
    job = settled(job, len(sites))
    if not relays(job):
        return job
    return job.model_copy(update={"cohort": job.cohort.model_copy(update={"sites": sites})})


def settled(job: Job, num_sites: int, *, own_strategy: bool = False) -> Job:
    """Return the job with words on secure aggregation, whatever it said.

    Args:
        job: the job.
        num_sites: how many sites take part.
        own_strategy: whether the strategy is given as a value, in place of the job's.
    """
    declared = registry.load_object("hansa.recipes.sums:declared")(job)
    given = job.secure_aggregation
    if given is None:
        found = _default(job, num_sites, declared, own_strategy)
    elif given.off is None:
        found = given.model_copy(update={"metrics": {**(declared or {}), **given.metrics}})
    else:
        found = given
    return job.model_copy(update={"secure_aggregation": found})


def _default(
    job: Job, num_sites: int, declared: Mapping[str, float] | None, own_strategy: bool
) -> SecureAggregationSection:
    section = SecureAggregationSection(by_default=True, metrics=dict(declared or {}))
    reason = _against(job.model_copy(update={"secure_aggregation": section}), num_sites, own_strategy)
    if reason is None and declared is None:
        reason = f"recipe {job.recipe.name!r} is not Hansa's, so the ranges of its metrics' sums are not known"
    return section if reason is None else SecureAggregationSection(off=reason)


def _against(job: Job, num_sites: int, own_strategy: bool) -> str | None:
    """Return what speaks against masks in a job that has them, or None."""
    assert job.masks is not None, "the job has them"
    if num_sites < job.masks.minimum:
        return f"{num_sites} sites take part, and fewer than {job.masks.minimum} are never summed"
    own: dict[str, Sequence[Choice]] = {
        "strategies": [job.strategy],
        "workflows": [job.workflow],
        "filters": job.filters,
    }
    for family, choices in own.items():
        for choice in choices:
            if choice.name not in registry.TABLES[family] or (family == "strategies" and own_strategy):
                return f"{choice.name!r} of the {family} is not Hansa's, so what it sums is known to its own code only"
    if job.homomorphic_encryption is not None:
        return "updates are encrypted: the server adds them up and can't read them, nor the sum"
    if job.privacy is not None:
        return _PRIVATE[job.privacy.mechanism]
    asked = min(wanted(job.cohort.sample, num_sites), num_sites)
    try:
        for count in (asked, num_sites):
            quorum_of(job.masks, count)
    except PrivacyError:
        return f"a round asks {asked} sites, and fewer than {job.masks.minimum} are never summed"
    course = Course(job.name, tuple(map(str, range(num_sites))), job.strategy, tuple(job.filters))
    for conflict in misfits(job, frozenset(), course):
        others = [piece for piece in conflict.pieces if Trait.MASKED not in piece.traits]
        if len(others) < len(conflict.pieces):
            return f"{' and '.join(map(str, others))} does not compose with them: {conflict.reason}"
    return None


def told(job: Job, num_sites: int) -> str:
    """Return what is said of a job, where it is checked, in its log and in its report."""
    section = job.secure_aggregation
    if section is None:
        return "Secure aggregation: off, because the job was submitted without a word on it."
    if section.off is not None:
        return f"Secure aggregation: off, because {section.off.removesuffix('.')}."
    asked = min(wanted(job.cohort.sample, num_sites), num_sites)
    needed, allowed = quorum_of(section, asked), wanted(job.cohort.quorum, asked)
    more = f", though cohort.quorum would do with {allowed}" if allowed < needed else ""
    how = "on, by default" if section.by_default else "on"
    script = ""
    if job.recipe.name == "script":
        names = sorted({name.removesuffix(".count") for name in section.metrics})
        script = f" Of scripts' metrics it has {', '.join(names) or 'none'}."
    return (
        f"Secure aggregation: {how}. The server sees sums over sites only; a round needs {max(needed, allowed)} of the "
        f"{asked} that it asks{more}.{script}"
    )
