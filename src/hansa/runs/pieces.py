# SPDX-License-Identifier: Apache-2.0
"""What a job is made of, as the fit check sees it: every piece with its traits."""

from __future__ import annotations

from hansa import registry
from hansa.core.config import Job
from hansa.core.fit import Conflict, Piece, Trait, conflicts
from hansa.core.workflow import Workflow
from hansa.errors import FitError, PolicyError
from hansa.privacy.plan import promised
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import wanted


def pieces_of(job: Job, traits: frozenset[Trait], course: Course) -> list[Piece]:
    """Return every piece of a job with its traits.

    Args:
        job: the job.
        traits: of its training code, and of the engine that it is to run in.
        course: the job's; where its sites are known, they tell whether a round asks all of them.
    """
    strategy, filters = course.pieces()
    rule = strategy.combine
    engine = _engine(job, traits)
    plain = job.train.optimizer == "sgd" and not job.train.momentum
    steps = frozenset() if plain else frozenset({Trait.ADAPTIVE_STEPS})
    training = traits - {Trait.VECTORISED} - engine.traits - steps
    if Trait.BOUNDS_EXAMPLES not in training:  # so a program that knows nothing of dp-sgd is refused under it
        training |= {Trait.WHOLE_BATCHES}
    clips = frozenset() if job.train.clip_grad is None else frozenset({Trait.BATCH_CLIP})
    workflow = workflow_of(job)
    return [
        Piece("strategy", strategy.name, strategy.traits),
        *([Piece("rule", rule.name, frozenset({Trait.NEEDS_EACH}), rule.least)] if rule else []),
        *(Piece("filter", piece.name, piece.traits) for piece in filters),
        Piece("recipe", job.recipe.name, training),
        Piece("optimizer", job.train.optimizer, steps | clips),
        Piece("workflow", workflow.name, workflow.traits),
        *_policy(job, len(course.sites)),
        engine,
        *([] if job.model.adapter else [Piece("model", "all parameters", frozenset({Trait.WHOLE_MODEL}))]),
        *promised(job),
        *_baselines(job),
    ]


def _policy(job: Job, num_sites: int) -> list[Piece]:
    cohort = job.cohort
    held = {
        ("everyone", Trait.EVERYONE): num_sites > 0 and wanted(cohort.sample, num_sites) >= num_sites,
        ("deadline", Trait.DEADLINE): cohort.deadline_s is not None,
        ("late", Trait.STALE): cohort.late == "accept",
    }
    return [Piece("cohort", name, frozenset({trait})) for (name, trait), holds in held.items() if holds]


def _engine(job: Job, traits: frozenset[Trait]) -> Piece:
    if Trait.REMOTE in traits:  # a deployment, whatever the job says of simulations
        return Piece("engine", "remote", frozenset({Trait.REMOTE, Trait.APART}))
    return Piece("engine", job.engine.name, frozenset({Trait.VECTORISED} if job.engine.name == "batched" else ()))


def relays(job: Job) -> bool:
    """Say whether a job's sites send messages to each other; no code but Hansa's own is loaded to find out."""
    return job.workflow.name in registry.TABLES["workflows"] and Trait.RELAYS in workflow_of(job).traits


def check_named(job: Job) -> None:
    """Raise PolicyError if sites are to send messages to each other and the job does not name them.

    A quorum that is a share of them would be a share of whomever the server says, and hold it to nothing.
    """
    if relays(job) and not job.cohort.sites:
        raise PolicyError(
            f"Workflow {job.workflow.name!r} hands the model from site to site, and the job does not name them, so no "
            "site could tell how few turns are below the quorum. Submit it by `hansa job submit`, which writes "
            "cohort.sites in before it signs."
        )


def _baselines(job: Job) -> list[Piece]:
    """Return the baselines that train."""
    traits = {"local": {Trait.UNPROTECTED}, "central": {Trait.UNPROTECTED, Trait.POOLS}}
    return [Piece("baseline", name, frozenset(own)) for name, own in traits.items() if getattr(job.baselines, name)]


def misfits(job: Job, traits: frozenset[Trait], course: Course) -> list[Conflict]:
    """Return everything that does not compose in a job, its sites known; arguments as of :func:`pieces_of`."""
    return conflicts(pieces_of(job, traits, course), fewest(job, len(course.sites)))


def check(job: Job, traits: frozenset[Trait], course: Course) -> None:
    """Raise FitError, with every reason, if the pieces of ``job`` do not compose."""
    found = misfits(job, traits, course)
    if found:
        raise FitError("\n".join(map(str, found)), job=job.name)


def fewest(job: Job, num_sites: int) -> int:
    """Return the fewest of ``num_sites`` that a round of the job asks, those aside in which nobody has a turn."""
    if job.privacy is not None and job.privacy.mechanism == "dp-ftrl":
        return max(1, num_sites // job.privacy.separation)
    return min(wanted(job.cohort.sample, num_sites), num_sites)


def workflow_of(job: Job) -> Workflow:
    """Return the workflow that the job names."""
    chosen: Workflow = registry.build("workflows", job.workflow.name, job.workflow.options)
    return chosen
