# SPDX-License-Identifier: Apache-2.0
"""The privacy plan of a job: what is promised, to whom, and on what assumptions.

Clip, noise, sampling and accountant are taken from here by the code that runs and by the code that states ε, so the ε
that is shown is the ε of what ran. A promise names its adversary:

===============  ============================================================================================
the public       whoever gets the models, of every round or the last, and the report; where cohorts are secret it does
                 not tell who took part. The run's log and ``metrics.jsonl`` do, and are the operator's
the sites        all sites but one's own together; they get every round's model, and know when they took part
the server       its operator, who sees every update as it arrives
===============  ============================================================================================

===========  ========================  ======================  ===========================  =================
mechanism    unit                      neighbours              the public and the sites     the server
===========  ========================  ======================  ===========================  =================
central      a site (a user's device)  one added or removed    ε, by sampling for those     nothing
                                                               who can't see the cohort
local        a site (a user's device)  its data replaced       ε over all rounds            the same ε
dp-sgd       an example                one added or removed    ε of each site by itself     the same ε
dp-ftrl      a site (a user's device)  one added or removed    ε, without sampling          nothing
distributed  a site (a user's device)  one added or removed    ε, without sampling          the same ε
===========  ========================  ======================  ===========================  =================

Of distributed noise "the sites" and "the server" mean at most ``secure_aggregation.corrupt`` of the sites asked, which
know their own shares of the noise and one another's; the rest must add theirs. Against all other sites together a site
has its own share alone: 1/√h of the noise, h being the fewest honest sites of a sum.

What no ε here covers stands in every plan: :data:`NOT_COVERED`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hansa.core.config import Job, PrivacySection
from hansa.core.fit import Piece, Trait, check_fit
from hansa.errors import PrivacyError
from hansa.privacy.accounting import Release, epsilon, noise_for

FEW_SITES = 100
"""With fewer sites than this, noise that hides a whole site hides most of what is learned."""

GRID = 2.0**23
"""How many steps of the grid of distributed noise the clip has at least; at most twice that."""

SLACK = 1 + 2.0**-8
"""What an update's norm may exceed the clip by, through rounding to half precision, and to the grid of distributed
noise (by half a step an element, of up to 10⁹ elements); noise is that much larger."""

NOT_COVERED = (
    "metrics on held-out data",
    "the number of examples that a site reports",
    "when a site is online, and for how long it works",
    "hyper-parameters chosen on the same data",
)


TRAITS = {
    "central": frozenset({Trait.PRIVATE, Trait.SERVER_NOISE, Trait.RATED, Trait.SECRET_COHORT}),
    "local": frozenset({Trait.PRIVATE}),
    "dp-sgd": frozenset({Trait.PER_EXAMPLE}),
    "dp-ftrl": frozenset({Trait.PRIVATE, Trait.SERVER_NOISE, Trait.TURNS}),
    "distributed": frozenset({Trait.PRIVATE, Trait.RATED, Trait.SHARED_NOISE}),
}
"""What the fit check needs to know of each mechanism."""


@dataclass(frozen=True)
class Terms:
    """What the code at server and sites needs of a plan.

    Attributes:
        section: the job's own words.
        rounds: how many releases there are: rounds, or local steps for dp-sgd.
        rate: the probability that a unit takes part in one.
        most: what an adaptive clip grows to at most: under masks, what has a place in their ring.
    """

    section: PrivacySection
    rounds: int
    rate: float = 1.0
    most: float = math.inf

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation over the clip; the least that meets the section's ε, where it gives one.

        Raises:
            PrivacyError: no noise multiplier meets the ε.
        """
        section = self.section
        if section.noise_multiplier is not None:
            return section.noise_multiplier
        assert section.epsilon is not None, "a section has one of the two"
        match section.mechanism:
            case "local":
                return 2 * noise_for(section.epsilon, section.delta, 1.0, self.rounds, section.accountant)
            case "dp-ftrl":
                return noise_for(section.epsilon, section.delta, 1.0, 1, section.accountant)
            case "distributed":
                return noise_for(section.epsilon, section.delta, 1.0, self.rounds, section.accountant, GRID)
            case _:
                return noise_for(section.epsilon, section.delta, self.rate, self.rounds, section.accountant)

    @property
    def releases(self) -> list[Release]:
        """What is released over the whole run, for those who can't see who takes part."""
        match self.section.mechanism:
            case "local":  # data are replaced: twice the clip
                return [Release(self.noise_multiplier / 2, 1.0, self.rounds)]
            case "dp-ftrl":  # all rounds together are one release, of the noise before it is correlated
                return [Release(self.noise_multiplier)]
            case "distributed":
                return [Release(self.noise_multiplier, 1.0, self.rounds, GRID)]
            case _:
                return [Release(self.noise_multiplier, self.rate, self.rounds)]

    def noises(self, expected: float) -> tuple[float, float]:
        """Return how noise is split between the sum and an adaptive clip's count: z_Δ⁻² + (2σ_b)⁻² = z⁻².

        Args:
            expected: how many sites take part in a round, on average.

        Raises:
            PrivacyError: the count alone would spend more than is promised.
        """
        total, adaptive = self.noise_multiplier, self.section.adaptive_clip
        if adaptive is None:
            return total, 0.0
        count = adaptive.noise if adaptive.noise is not None else expected / 20
        if total >= 2 * count:
            raise PrivacyError(
                f"A noise multiplier of {total:g} leaves nothing for the sum beside a count of noise {count:g}: that "
                f"must be above {total / 2:g}. Set privacy.adaptive_clip.noise, ask more sites, or leave it out."
            )
        return (total**-2 - (2 * count) ** -2) ** -0.5, count


@dataclass(frozen=True)
class Claim:
    """An ε for one adversary; None where nothing is promised."""

    adversary: str
    epsilon: float | None
    because: str

    def __str__(self) -> str:
        shown = "nothing is promised" if self.epsilon is None else f"ε = {self.epsilon:.3g}"
        return f"against {self.adversary}: {shown} ({self.because})"


@dataclass(frozen=True)
class PrivacyPlan:
    """What a job promises.

    Attributes:
        unit: whose presence is hidden.
        neighbours: how two neighbouring data sets differ.
        sampling: how units are drawn, and what the claim assumes of it.
        claims: ε by adversary, at the section's δ.
        warnings: what the user should think about.
    """

    terms: Terms
    unit: str
    neighbours: str
    sampling: str
    claims: tuple[Claim, ...]
    warnings: tuple[str, ...]

    @property
    def secret_cohorts(self) -> bool:
        """Whether a claim rests on nobody's knowing who took part in a round."""
        return self.terms.section.mechanism == "central" and self.terms.rate < 1

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        section = self.terms.section
        return {
            "mechanism": section.mechanism,
            "unit": self.unit,
            "neighbours": self.neighbours,
            "sampling": self.sampling,
            "clip": section.clip,
            "noise_multiplier": self.terms.noise_multiplier,
            "delta": section.delta,
            "accountant": section.accountant,
            "claims": [asdict(claim) for claim in self.claims],
            "warnings": list(self.warnings),
            "secret_cohorts": self.secret_cohorts,
            "not_covered": list(NOT_COVERED),
        }


def terms_of_job(job: Job) -> Terms | None:
    """Return what server and sites agree on before training; dp-sgd's terms are each site's own: None.

    Raises:
        FitError: the cohort is not drawn as the accountant assumes, or something else does not go with the promise.
        PrivacyError: an adaptive clip begins above what its ring holds.
    """
    section = job.privacy
    if section is None or section.mechanism == "dp-sgd":
        return None
    check_fit(promised(job))
    rate = job.cohort.sample if Trait.RATED in TRAITS[section.mechanism] else 1.0
    most = math.inf
    if section.adaptive_clip and job.masks is not None:
        most = job.masks.range / SLACK
        if section.clip > most:
            raise PrivacyError(
                f"privacy.clip begins at {section.clip:g}, and secure_aggregation.range = {job.masks.range:g} has "
                f"place for one of {most:g} at most. Raise the range, or begin with less.",
                job=job.name,
            )
    return Terms(section, job.rounds, rate, most)


def promised(job: Job) -> list[Piece]:
    """Return what a job promises, and what it says of who is asked: promises rest on that."""
    pieces = []
    sample, quorum = job.cohort.sample, job.cohort.quorum
    if sample != 1.0 or isinstance(sample, int):
        drawn = {Trait.DRAWN, Trait.COUNTED} if isinstance(sample, int) else {Trait.DRAWN}
        pieces.append(Piece("cohort", "sample", frozenset(drawn)))
    if isinstance(quorum, int) and quorum > 1:
        pieces.append(Piece("cohort", "quorum", frozenset({Trait.HEADCOUNT}), quorum))
    if job.privacy is not None:
        pieces.append(Piece("privacy", job.privacy.mechanism, TRAITS[job.privacy.mechanism]))
    if job.masks is not None:
        masked = {Trait.MASKED, Trait.ADDS_SHARES}
        if not job.masks.by_default:
            masked.add(Trait.KEYED)
        pieces.append(Piece("secure_aggregation", "masks", frozenset(masked), job.masks.minimum))
    if job.homomorphic_encryption is not None:
        encrypted = {Trait.MASKED, Trait.KEYED, Trait.ENCRYPTED}
        if not job.homomorphic_encryption.full_model:
            encrypted.add(Trait.ADAPTERS_ONLY)
        least = job.homomorphic_encryption.minimum
        pieces.append(Piece("homomorphic_encryption", "ckks", frozenset(encrypted), least))
    return pieces


def plan_of(job: Job, sites: int, examples: int | None = None) -> PrivacyPlan | None:
    """Return the plan of a job, or None if it promises nothing.

    Args:
        job: the job.
        sites: how many sites there are.
        examples: dp-sgd: the training examples of the site with the fewest, whose ε is the largest.

    Raises:
        PrivacyError: a piece of the plan contradicts another.
        FitError: another piece of the job contradicts the plan.
    """
    section = job.privacy
    if section is None:
        return None
    unit = section.unit or ("example" if section.mechanism == "dp-sgd" else "user")
    _check_unit(section, unit)
    if section.mechanism == "dp-sgd":
        return _of_steps(job, section, unit, examples)
    terms = terms_of_job(job)
    assert terms is not None
    terms.noises(terms.rate * sites)
    spent = epsilon(terms.releases, section.delta, section.accountant)
    shown = "a site" if unit == "site" else f"a {unit}, whose device is a site"
    few: tuple[str, ...] = (
        f"There are {sites} sites, and the noise hides a whole site: below {FEW_SITES} of them it hides most of what "
        "is learned. dp-sgd hides examples instead.",
    )
    warnings = few if sites < FEW_SITES else ()
    if section.delta >= 1 / max(sites, 1):
        warnings += (f"delta = {section.delta:g} is not below one over the number of sites (1/{sites}).",)
    server = Claim("the server", None, "it sees every update before noise is added")
    match section.mechanism:
        case "local":
            claims = tuple(Claim(who, spent, "noise is added at the site") for who in ("the public", "the sites"))
            own = Claim("the server", spent, "noise is added at the site; each round counts in full")
            return PrivacyPlan(
                terms, shown, "the site's data are replaced by any other", "none is assumed", (*claims, own), warnings
            )
        case "dp-ftrl":
            matrix = "correlated noise; no sampling is assumed"
            claims = tuple(Claim(who, spent, matrix) for who in ("the public", "the sites"))
            turns = (
                f"sites take turns, each every {section.separation} rounds" if section.separation > 1 else "everybody"
            )
            return PrivacyPlan(terms, shown, "one site added or removed", turns, (*claims, server), warnings)
        case "distributed":
            assert job.secure_aggregation is not None, "its terms were asked for"
            share = f"working with at most {job.secure_aggregation.corrupt:.0%} of the sites asked"
            because = "each site adds a share of the noise before its update is masked; no sampling is assumed"
            public, others = Claim("the public", spent, because), Claim("the sites", spent, f"{because}; {share}")
            claims = (public, others)
            sums = Claim("the server", spent, f"it sees sums only; {share}, whose shares of the noise it knows")
            return PrivacyPlan(terms, shown, "one site added or removed", "none is assumed", (*claims, sums), warnings)
        case _:
            seen = epsilon([Release(terms.noise_multiplier, 1.0, job.rounds)], section.delta, section.accountant)
            public = Claim("the public", spent, f"each round asks each site with probability {terms.rate:g}, in secret")
            if terms.rate == 1:
                public = Claim("the public", spent, "every site takes part in every round")
            those = Claim("the sites", seen, "no amplification is claimed against those who may learn who takes part")
            sampling = f"Poisson, rate {terms.rate:g}, drawn in secret" if terms.rate < 1 else "everybody, every round"
            return PrivacyPlan(terms, shown, "one site added or removed", sampling, (public, those, server), warnings)


def _of_steps(job: Job, section: PrivacySection, unit: str, examples: int | None) -> PrivacyPlan:
    if not examples:
        raise PrivacyError("dp-sgd's ε depends on the number of examples at each site, and none is known here.")
    rate = min(1.0, job.train.batch_size / examples)
    terms = Terms(section, job.rounds * steps_of(job, examples), rate)
    spent = epsilon(terms.releases, section.delta, section.accountant)
    because = "noise is in every step; batches are drawn at the site, in secret"
    claims = tuple(Claim(who, spent, because) for who in ("the public", "the sites", "the server"))
    warnings: tuple[str, ...] = ()
    if section.delta >= 1 / examples:
        warnings = (f"delta = {section.delta:g} is not below one over the number of examples (1/{examples}).",)
    sampling = f"Poisson, rate {rate:g} of a site's {examples} examples at least, for every step"
    neighbours = "one added or removed; a site's weight tells how many there are, and that is taken as public"
    return PrivacyPlan(terms, f"an {unit} of a site's training data", neighbours, sampling, claims, warnings)


def steps_of(job: Job, examples: int) -> int:
    """Return how many local steps a site with so many examples makes in a round of dp-sgd.

    An epoch is as many batches as hold, on average, every example once.
    """
    if job.train.steps is not None:
        return job.train.steps
    return max(1, math.ceil((job.train.epochs or 1.0) * examples / job.train.batch_size))


def _check_unit(section: PrivacySection, unit: str) -> None:
    if (unit == "example") != (section.mechanism == "dp-sgd"):
        other = "mechanism = 'dp-sgd'" if unit == "example" else "unit = 'example'"
        raise PrivacyError(
            f"Mechanism {section.mechanism!r} does not hide one {unit}. Use {other}, or leave privacy.unit out."
        )
    if section.adaptive_clip and section.mechanism != "central":
        raise PrivacyError("privacy.adaptive_clip is for mechanism = 'central'.")
    if (section.participations or section.separation > 1) and section.mechanism != "dp-ftrl":
        raise PrivacyError("privacy.participations and separation are for mechanism = 'dp-ftrl'.")
    if section.weight_cap and section.mechanism not in ("central", "dp-ftrl"):
        raise PrivacyError("privacy.weight_cap bounds what a site adds to a sum that the server noises. Leave it out.")
