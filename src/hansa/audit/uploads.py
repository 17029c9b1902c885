# SPDX-License-Identifier: Apache-2.0
"""What the server reads in single uploads, and how often it names the example behind one.

Attacks that reconstruct inputs are all given the strongest case first: every site trains on one example, in one step,
under the job's own clip, noise and masks. What they are held against is the same attack on noise, and, where an ε is
promised, the most that ε allows: of M examples drawn alike, an attacker names the right one with probability at most
e^ε/M + δ, since Σ_i P[names i | nobody] ≤ 1 and P[names i | i] ≤ e^ε P[names i | nobody] + δ.

| case | result |
|---|---|
| masked or encrypted | elements of the ring, or residues, taken for signed numbers: all that whoever reads it has |
| a site that was not asked, by sampling or by its turn | it gives no upload; others are tried |
| a job whose noise follows from an ε | the noise multiplier of the whole job, also for one example |
| no site answers with an upload | there is none, and the attack is skipped |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hansa import registry
from hansa.audit.finding import Measure, Verdict
from hansa.audit.subject import Rows, Subject, Transparent
from hansa.core import tree as trees
from hansa.core.config import SecureAggregationSection
from hansa.core.tree import Array, Tree
from hansa.core.values import Aggregate, Update
from hansa.homomorphic.ckks import PRIMES
from hansa.runs.progress import Progress
from hansa.workflows.homomorphic import CIPHERTEXTS, SEALED
from hansa.workflows.secure import MASKED, VECTOR

DELTA = "delta"
CANDIDATES = 64
"""Examples among which the one behind an upload is looked for, at most."""
CONFIDENCE = 0.95
"""Of the intervals that are shown."""
SURE = 0.999
"""Of the interval whose lower end must not be above a bound."""
CHANCE = 1e-4
"""An attack on uploads is better than the one on noise where chance explains it less often than this."""


@dataclass(frozen=True)
class Upload:
    """One site's upload, as the server reads it.

    Attributes:
        site: whose.
        rows: the training examples it came of.
        delta: what it says of each tensor of the model, up to a factor; an update is −η times a gradient.
    """

    site: str
    rows: Rows
    delta: Tree


@dataclass(frozen=True)
class Seen:
    """What the server saw of one round: the uploads, and what its rule was given for their sum."""

    uploads: tuple[Upload, ...]
    total: Tree


def transparent(subject: Subject) -> Transparent | None:
    """Return the program if its training examples can be told apart."""
    return subject.program if isinstance(subject.program, Transparent) else None


def one_round(subject: Subject, rows: Mapping[str, Rows]) -> Seen:
    """Carry one round out in which every site has only these of its training examples.

    Raises:
        HansaError: as a run of the job would.
    """
    program = transparent(subject)
    assert program is not None, "attacks look first"
    found: list[Upload] = []
    totals: list[Tree] = []

    def seen(update: Update) -> None:
        found.append(Upload(update.site, rows[update.site], read(update, subject.params)))

    def released(_round: int, aggregate: Aggregate) -> None:
        summed = aggregate.sums.get(DELTA, {})
        totals.append({name: np.asarray(summed[name], np.float64) for name in summed})

    subject.carry_out(program=program.holding(rows), rounds=1, seen=seen, released=released)
    return Seen(tuple(found), totals[-1] if totals else {})


def read(update: Update, params: Tree) -> dict[str, Array]:
    """Return what an upload says of each floating tensor of the model, float64.

    What is masked or encrypted is read as it lies there: elements of the ring, and residues, as signed numbers. The
    last of them stand for the update, in the order of tensors' names; weight and metrics come before.
    """
    shapes = {name: leaf.shape for name, leaf in sorted(trees.floating(params).items())}
    if DELTA in update.parts:
        return {name: np.asarray(leaf, np.float64) for name, leaf in sorted(update.parts[DELTA].items())}
    if SEALED in update.parts:
        words = np.asarray(update.parts[SEALED][CIPHERTEXTS]).astype(np.int64)  # below 2^60
        vector = np.where(words > PRIMES[0] // 2, words - PRIMES[0], words).astype(np.float64)
    else:
        ring = np.asarray(update.parts[MASKED][VECTOR])
        vector = ring.view(f"i{ring.itemsize}").astype(np.float64)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    assert vector.size >= size, "every element of the model has one of the ring, or four residues"
    vector = vector[vector.size - size :]
    return _shaped(vector / max(float(np.abs(vector).max()), 1e-300), shapes)


def noise(params: Tree, generator: np.random.Generator) -> dict[str, Array]:
    """Return an upload that nothing stands behind: normal noise on every floating tensor."""
    shapes = {name: leaf.shape for name, leaf in sorted(trees.floating(params).items())}
    return _shaped(generator.standard_normal(sum(int(np.prod(shape)) for shape in shapes.values())), shapes)


def _shaped(vector: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    tree, begin = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tree[name] = vector[begin : begin + size].reshape(shape)
        begin += size
    return tree


def alone(subject: Subject) -> Subject:
    """Return the job with one step on one example a round, and otherwise as it is: the strongest case."""
    job, section = subject.job, subject.job.privacy
    train = job.train.model_copy(update={"batch_size": 1, "steps": 1, "epochs": None})
    if section is not None and subject.plan is not None:  # else fewer releases would need less noise for the same ε
        pinned = {"noise_multiplier": subject.plan.terms.noise_multiplier, "epsilon": None}
        section = section.model_copy(update=pinned)
    return subject.of(job.model_copy(update={"train": train, "privacy": section}))


def unprotected(subject: Subject) -> Subject:
    """Return the job without clip, noise and masks, every site asked, to show what they keep from the server."""
    job = subject.job
    unmasked = SecureAggregationSection(off="what it keeps from the server is shown")  # None: on by default
    protections = {"privacy": None, "secure_aggregation": unmasked, "homomorphic_encryption": None}
    everybody = job.cohort.model_copy(update={"sample": 1.0})
    return subject.of(job.model_copy(update={**protections, "filters": [], "cohort": everybody}))


def is_protected(subject: Subject) -> bool:
    """Say whether uploads pass anything on their way that hides or changes them."""
    job = subject.job
    return bool(job.privacy or job.secret_sums or job.filters)


def single_uploads(
    subject: Subject, count: int, generator: np.random.Generator, progress: Progress
) -> list[tuple[Upload, Rows]]:
    """Return ``count`` uploads that came of one example each, drawn alike from at most ``CANDIDATES`` of its site.

    Returns:
        each upload, and the examples it could have come of; fewer where sites are rarely asked.
    """
    program = transparent(subject)
    assert program is not None, "attacks look first"
    found: list[tuple[Upload, Rows]] = []
    pools = {
        site: generator.permutation(program.count(site))[:CANDIDATES].astype(np.int64)
        for site in program_sites(subject)
    }
    for _ in range(4 * count):
        drawn = {site: generator.choice(pool, 1) for site, pool in pools.items()}
        found += [(upload, pools[upload.site]) for upload in one_round(subject, drawn).uploads]
        progress.advance()
        if len(found) >= count:
            break
    return found[:count]


def program_sites(subject: Subject) -> Sequence[str]:
    """Return the sites whose data are here."""
    return tuple(report.site for report in subject.reports)


def named(right: int, tries: int, among: int, subject: Subject) -> tuple[Measure, ...]:
    """Return how often the right example was named, beside what guessing gives and the most that ε allows.

    Args:
        right: how often.
        tries: of how many.
        among: how many examples there were to choose from.
        subject: whose promise against the server is looked up.
    """
    low, high = clopper_pearson(right, tries)
    measures = [Measure("right example named", right / tries, 1 / among, low, high)]
    epsilon = subject.promised("the server")
    if epsilon is not None and subject.job.privacy is not None:
        most = min(1.0, float(np.exp(min(epsilon, 700.0))) / among + subject.job.privacy.delta)
        least, _ = clopper_pearson(right, tries, SURE)
        measures.append(Measure(f"right example named, at least ({SURE:.1%} sure)", least, 1 / among, bound=most))
    return tuple(measures)


def clopper_pearson(successes: int, tries: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact two-sided interval of a proportion (Clopper and Pearson 1934).

    >>> [round(end, 3) for end in clopper_pearson(5, 10, 0.95)]
    [0.187, 0.813]
    """
    beta = registry.load_object("scipy.stats:beta")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, tries - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, tries - successes)) if successes < tries else 1.0
    return low, high


def is_better(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> bool:
    """Say whether ``values`` are larger than ``baseline`` beyond chance, by the rank test of Mann and Whitney."""
    if np.ptp(np.concatenate([values, baseline])) == 0:
        return False
    test = registry.load_object("scipy.stats:mannwhitneyu")
    return bool(test(values, baseline, alternative="greater").pvalue < CHANCE)


def verdict(subject: Subject, upload: bool, total: bool, broken: bool) -> Verdict:
    """Return what follows from an attack on uploads.

    Args:
        subject: what was attacked.
        upload: whether a single upload told more than noise does.
        total: whether a sum of them did, where only sums are to be seen.
        broken: whether a measure is above its bound.
    """
    if broken or (upload and subject.job.secret_sums is not None):
        return "fails"
    promised = subject.promised("the server") is not None
    return "leaks" if (upload or total) and not promised else "holds"
