# SPDX-License-Identifier: Apache-2.0
"""The fit check: pieces declare traits, rules are over traits, and an unsound mix is refused before any site
is contacted. This module knows no strategy, filter, recipe or engine by name.

| a rule says | of |
|---|---|
| these must not be together | two traits of different pieces, or three where each two of them are sound |
| this needs that | a trait, and one that some piece has to have |
| this needs so many updates | a piece, against how many sites a round asks |

docs/composition.md is made from these rules (:mod:`hansa.runs.composition`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import combinations, permutations

from hansa.errors import FitError


class Trait(Enum):
    """What a piece of a job needs, does, or lacks."""

    STEP_LEVEL = "changes every local step"
    PLAIN_STEPS = "assumes plain SGD steps (w − ηg)"
    STATEFUL = "keeps state at the sites from round to round"
    EXTRA_PARTS = "sends parts beside the update whose meaning depends on the round"
    WHOLE_WORK = "gives a wrong mean when a site does part of its work"
    OPAQUE_STEPS = "trains out of sight: only finished updates can be seen"
    ADAPTIVE_STEPS = "takes local steps that are not plain SGD"
    VECTORISED = "trains many sites as one computation"
    STEPWISE = "trains one site at a time, in its own way"
    TIMED = "cuts off sites by the clock"
    DEADLINE = "gives sites a time to answer in"
    STALE = "lets updates that started from an older model into the sum"
    EVERYONE = "asks every site in every round"
    DRAWN = "draws who is asked"
    COUNTED = "draws a number of sites, not each by itself"
    HEADCOUNT = "ends the job below a number of answers"
    CLIPS = "bounds an update's norm"
    WEIGHS = "multiplies an update by its weight"
    ENCODES = "changes an update's dtype or form for the wire"
    SERVER_STEP = "does more at the server than add the mean update"
    PRIVATE = "hides one site's whole update in noise"
    RATED = "divides by the number of sites that it expects"
    SECRET_COHORT = "counts on nobody's knowing who takes part"
    SERVER_NOISE = "adds noise to the sum at the server"
    TURNS = "has sites take turns"
    SHARED_NOISE = "has each site add a share of the noise"
    PER_EXAMPLE = "bounds every single example's gradient, on batches drawn in secret"
    BOUNDS_EXAMPLES = "can bound what each example does to a step"
    WHOLE_BATCHES = "bounds no single example"
    BATCH_CLIP = "clips the gradient of a batch"
    MASKED = "shows the server sums only"
    ADDS_SHARES = "takes a share of noise from each site into its sum"
    KEYED = "has each site agree on keys with others"
    ENCRYPTED = "sums encrypted updates, to which one site has the key"
    ADAPTERS_ONLY = "is for the small updates of an adapter"
    WHOLE_MODEL = "trains more than an adapter"
    UNPROTECTED = "trains on the same data without protection"
    POOLS = "trains on all sites' data in one place"
    APART = "keeps each site's data where they are"
    NEEDS_EACH = "looks at each site's update by itself"
    RELAYS = "hands the model from site to site, without a sum or a server step"
    REMOTE = "reaches its sites over the network"


@dataclass(frozen=True)
class Piece:
    """One part of a job: its family (``strategy``, ``filter``, ...), name, and traits, in the order of use.

    ``least`` is how many updates a round has to have for it.
    """

    family: str
    name: str
    traits: frozenset[Trait]
    least: int = 0

    def __str__(self) -> str:
        return f"{self.family} {self.name!r}"


@dataclass(frozen=True)
class Conflict:
    """Pieces that must not be combined, or one that lacks what it needs; why, and the nearest sound choice."""

    pieces: tuple[Piece, ...]
    reason: str
    instead: str

    def __str__(self) -> str:
        first, *others = map(str, self.pieces)
        together = f" does not compose with {' and '.join(others)}" if others else ""
        return f"{first}{together}: {self.reason} Instead: {self.instead}"


@dataclass(frozen=True)
class Rule:
    """Traits that no pieces of one job may have between them: two, or three where each two of them are sound."""

    traits: tuple[Trait, ...]
    reason: str
    instead: str


@dataclass(frozen=True)
class Need:
    """A trait that is sound only where some piece of the job has another."""

    trait: Trait
    needed: Trait
    reason: str
    instead: str


RULES = (
    Rule(
        (Trait.STEP_LEVEL, Trait.OPAQUE_STEPS),
        "the algorithm has to change every local step, and this training hands over finished updates only.",
        "use an algorithm that acts on updates (fedavg, fedavgm, fedadam, fedyogi, fedadagrad).",
    ),
    Rule(
        (Trait.PLAIN_STEPS, Trait.ADAPTIVE_STEPS),
        "its control variates are computed as (w − y)/(Kη), which holds for plain SGD steps only.",
        "use train.optimizer = 'sgd' without momentum, or another strategy.",
    ),
    Rule(
        (Trait.WHOLE_WORK, Trait.TIMED),
        "a site whose time is up has done part of its work, and such updates would be rejected in every round.",
        "use fedprox (mu = 0 is fedavg that takes partial work) or scaffold, or leave out train.max_seconds.",
    ),
    Rule(
        (Trait.VECTORISED, Trait.STEPWISE),
        "the engine needs training that is a pure function of (params, batch).",
        "use engine 'local' or 'processes'.",
    ),
    Rule(
        (Trait.VECTORISED, Trait.TIMED),
        "sites trained as one computation all end at the same moment, so none can stop by itself.",
        "leave out train.max_seconds, or use engine 'processes'.",
    ),
    Rule(
        (Trait.VECTORISED, Trait.DEADLINE),
        "sites trained as one computation all end at the same moment, so a deadline means nothing.",
        "leave out cohort.deadline_s, or use engine 'processes'.",
    ),
    Rule(
        (Trait.STATEFUL, Trait.CLIPS),
        "what a site keeps and what it sends of it come apart once an update is shortened, and the difference stays "
        "for good: the model ends somewhere else.",
        "use train.clip_grad, or a strategy whose only part is the update.",
    ),
    Rule(
        (Trait.RELAYS, Trait.SERVER_STEP),
        "no server step is made, so the algorithm would be another one.",
        "use fedavg or fedprox with lr = 1, or workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.RELAYS, Trait.CLIPS),
        "sites hand over whole models, and no update passes through the filter.",
        "leave the filter out, or use workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.RELAYS, Trait.ENCODES),
        "sites hand over whole models, and no update passes through the filter.",
        "leave the filter out, or use workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.RELAYS, Trait.DEADLINE),
        "the next site waits for the model that the last one is training, however long that takes.",
        "leave out cohort.deadline_s; train.max_seconds ends a site's turn.",
    ),
    Rule(
        (Trait.RELAYS, Trait.STALE),
        "a late site has no turn to come back to.",
        "use cohort.late = 'discard'.",
    ),
    Rule(
        (Trait.RELAYS, Trait.VECTORISED),
        "sites take turns, so there is nothing to train at once.",
        "use engine 'local' or 'processes'.",
    ),
    Rule(
        (Trait.PRIVATE, Trait.RELAYS),
        "a whole model leaves each site, and no sum is made that noise could hide it in.",
        "use workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.PRIVATE, Trait.STALE),
        "a late update counts in a round that its site was not drawn for or whose turn it was not, and for which "
        "nobody has accounted for it.",
        "use cohort.late = 'discard'.",
    ),
    Rule(
        (Trait.PRIVATE, Trait.EXTRA_PARTS),
        "its parts share one bound, and the control variates would be noise for the most part.",
        "use fedavg, fedprox, fedavgm or an adaptive server optimiser.",
    ),
    Rule(
        (Trait.PRIVATE, Trait.UNPROTECTED),
        "its scores come from models that were trained on the same data without noise, and are shown.",
        "set baselines.local and baselines.central to false.",
    ),
    Rule(
        (Trait.PER_EXAMPLE, Trait.WHOLE_BATCHES),
        "no bound can be put on what one example does.",
        "use a recipe that Hansa trains itself, hansa.client.prepare in a script and recipe.steps = 'prepared', or "
        "mechanism 'local' or 'central', which bound a site's whole update.",
    ),
    Rule(
        (Trait.PER_EXAMPLE, Trait.BATCH_CLIP),
        "train.clip_grad would cut off the noise together with the gradient; each example is clipped already.",
        "leave out train.clip_grad; privacy.clip is the bound of an example.",
    ),
    Rule(
        (Trait.PER_EXAMPLE, Trait.UNPROTECTED),
        "it trains on the same data once more, and what that spends is not in the plan.",
        "set baselines.local and baselines.central to false.",
    ),
    Rule(
        (Trait.PER_EXAMPLE, Trait.VECTORISED),
        "every site draws its batches and its noise in secret, by itself.",
        "use engine 'local' or 'processes'.",
    ),
    Rule(
        (Trait.RATED, Trait.COUNTED),
        "the sum is divided by the number of sites expected, and noise accounted for, by the probability that a site "
        "takes part by itself; a number of sites is none.",
        "write the probability as a fraction: cohort.sample = 0.1, or 1.0 for all.",
    ),
    Rule(
        (Trait.TURNS, Trait.DRAWN),
        "sites take turns, and none is drawn.",
        "leave cohort.sample out; privacy.separation = 10 asks a tenth of the sites in each round.",
    ),
    Rule(
        (Trait.SECRET_COHORT, Trait.DRAWN, Trait.MASKED),
        "a drawn cohort of too few sites to sum is left out as a whole, so one more site in it can move the model by "
        "the updates of all of them, which the noise does not hide.",
        "use mechanism 'distributed', whose claims need no draw; or cohort.sample = 1.0; or let the server see "
        "updates, as mechanism 'central' promises nothing against it.",
    ),
    Rule(
        (Trait.SECRET_COHORT, Trait.DRAWN, Trait.HEADCOUNT),
        "a cohort drawn in secret has now more and now fewer sites, and a job that ends below a number of them tells "
        "how many there were, which no noise hides.",
        "write cohort.quorum as a fraction of those asked.",
    ),
    Rule(
        (Trait.STALE, Trait.EVERYONE),
        "a site that was late is asked again in the next round, and only its new answer counts.",
        "ask fewer sites a round (cohort.sample), or use cohort.late = 'discard'.",
    ),
    Rule(
        (Trait.POOLS, Trait.APART),
        "each site's data stay where they are, so nothing can train on all of them.",
        "set baselines.central to false.",
    ),
    Rule(
        (Trait.MASKED, Trait.RELAYS),
        "a whole model goes from site to site, and there is no sum that masks could cancel in.",
        "use workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.MASKED, Trait.STALE),
        "the masks of a late update belong to a round whose sum is made, and cancel in no other.",
        "use cohort.late = 'discard'.",
    ),
    Rule(
        (Trait.KEYED, Trait.VECTORISED),
        "sites that are one computation have no updates of their own to mask.",
        "use engine 'local' or 'processes'.",
    ),
    Rule(
        (Trait.MASKED, Trait.ENCODES),
        "what travels are elements of a ring or ciphertexts, as wide whatever they were made from.",
        "leave the filter out; the step and range of [secure_aggregation] decide how wide.",
    ),
    Rule(
        (Trait.MASKED, Trait.UNPROTECTED),
        "a model of one site's own training would be judged and shown.",
        "set baselines.local and baselines.central to false.",
    ),
    Rule(
        (Trait.ENCRYPTED, Trait.MASKED),
        "each makes a sum of its own kind: masks are added as they are, and cancel in no ciphertext.",
        "keep secure_aggregation, where no single site holds a key to the sum; or homomorphic_encryption, where sites "
        "are few and one of them is trusted with sums.",
    ),
    Rule(
        (Trait.SERVER_NOISE, Trait.ENCRYPTED),
        "the site with the key decrypts each sum before the server adds noise to it, and the promise is to hold "
        "against sites.",
        "use secure_aggregation, where no site sees the sum; or mechanism 'local' or 'dp-sgd', whose noise is in every "
        "update.",
    ),
    Rule(
        (Trait.ADAPTERS_ONLY, Trait.WHOLE_MODEL),
        "an encrypted number takes 32 bytes, so a whole model is eight times what it is, for every site and round.",
        "give model.adapter, or use secure_aggregation, or pay for it with homomorphic_encryption.full_model = true.",
    ),
    Rule(
        (Trait.NEEDS_EACH, Trait.MASKED),
        "the server sees a sum only, so it can neither compare updates nor hold one to a bound.",
        "leave strategy.robust out, or set secure_aggregation = false and have no homomorphic_encryption: say whether "
        "you fear the sites or the server.",
    ),
    Rule(
        (Trait.NEEDS_EACH, Trait.PRIVATE),
        "noise is measured for a sum of bounded updates, which the rule's result is not, and noise that sites add "
        "themselves is most of what it would compare.",
        "leave strategy.robust out, as privacy.clip bounds what each site does already; or use mechanism 'dp-sgd'.",
    ),
    Rule(
        (Trait.NEEDS_EACH, Trait.EXTRA_PARTS),
        "a lie in the other parts would get around a rule for the update, and what it chooses there means nothing.",
        "use a strategy whose only part is the update (fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad).",
    ),
    Rule(
        (Trait.NEEDS_EACH, Trait.RELAYS),
        "a site hands its model straight to the next, and no updates lie side by side.",
        "use workflow 'scatter-gather'.",
    ),
    Rule(
        (Trait.NEEDS_EACH, Trait.STALE),
        "an update that started from an older model is far from all others, or passes for far, though nobody lied.",
        "use cohort.late = 'discard'.",
    ),
    Rule(
        (Trait.EXTRA_PARTS, Trait.STALE),
        "a part from an older round would be added to a newer state.",
        "use cohort.late = 'discard', or a strategy whose only part is the update.",
    ),
)

NEEDS = (
    Need(
        Trait.SHARED_NOISE,
        Trait.ADDS_SHARES,
        "of distributed noise each site adds a share that hides nothing by itself: only a sum that nobody sees apart "
        "is private.",
        "add [secure_aggregation], or use mechanism 'local'.",
    ),
    Need(
        Trait.STALE,
        Trait.DEADLINE,
        "nobody is late without a deadline.",
        "set cohort.deadline_s, or use cohort.late = 'discard'.",
    ),
)

ORDER = (Trait.CLIPS, Trait.WEIGHS, Trait.ENCODES)
"""What filters do, in the order in which it is sound."""

_DISORDER = "a bound or a weight applied after that step no longer holds for what is sent."


def conflicts(pieces: Iterable[Piece], asked: int | None = None) -> list[Conflict]:
    """Return everything unsound among ``pieces``, in the order of the rules.

    Args:
        pieces: of one job.
        asked: the fewest sites that a round asks, where that is known.
    """
    pieces = list(pieces)
    found = [
        Conflict(those, rule.reason, rule.instead)
        for rule in RULES
        for those in permutations(pieces, len(rule.traits))
        if all(trait in piece.traits for trait, piece in zip(rule.traits, those, strict=True))
    ]
    held = frozenset[Trait]().union(*(piece.traits for piece in pieces))
    found += [
        Conflict((piece,), need.reason, need.instead)
        for need in NEEDS
        for piece in pieces
        if need.trait in piece.traits and need.needed not in held
    ]
    filters = [piece for piece in pieces if piece.family == "filter" and piece.traits.intersection(ORDER)]
    found += [
        Conflict((later, earlier), _DISORDER, f"put {later.name!r} before {earlier.name!r}.")
        for earlier, later in combinations(filters, 2)
        if _stage(later) < _stage(earlier)
    ]
    return found + [
        Conflict(
            (piece,),
            f"it needs at least {piece.least} updates, and a round asks {asked} sites.",
            "ask more sites (cohort.sample), or ask less of it.",
        )
        for piece in pieces
        if asked is not None and asked < piece.least
    ]


def _stage(piece: Piece) -> int:
    return max(i for i, trait in enumerate(ORDER) if trait in piece.traits)


def check_fit(pieces: Iterable[Piece], asked: int | None = None) -> None:
    """Raise FitError with every reason if the pieces do not compose; never drops or changes one."""
    found = conflicts(pieces, asked)
    if found:
        raise FitError("\n".join(str(conflict) for conflict in found))
