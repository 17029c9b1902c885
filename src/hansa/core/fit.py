# SPDX-License-Identifier: Apache-2.0
"""The fit check: pieces declare traits, rules are over traits, and an unsound mix is refused before any site
is contacted. This module knows no strategy, filter, recipe or engine by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

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
    STALE = "lets updates that started from an older model into the sum"
    CLIPS = "bounds an update's norm"
    WEIGHS = "multiplies an update by its weight"
    ENCODES = "changes an update's dtype or form for the wire"
    SERVER_STEP = "does more at the server than add the mean update"
    PRIVATE = "hides one site's whole update in noise"
    PER_EXAMPLE = "bounds every single example's gradient, on batches drawn in secret"
    BOUNDS_EXAMPLES = "can bound what each example does to a step"
    WHOLE_BATCHES = "bounds no single example"
    BATCH_CLIP = "clips the gradient of a batch"
    MASKED = "shows the server sums only"
    ENCRYPTED = "sums encrypted updates, to which one site has the key"
    ADAPTERS_ONLY = "is for the small updates of an adapter"
    WHOLE_MODEL = "trains more than an adapter"
    UNPROTECTED = "trains on the same data without protection"
    NEEDS_EACH = "looks at each site's update by itself"
    RELAYS = "hands the model from site to site, without a sum or a server step"


@dataclass(frozen=True)
class Piece:
    """One part of a job: its family (``strategy``, ``filter``, ...), name, and traits, in the order of use."""

    family: str
    name: str
    traits: frozenset[Trait]

    def __str__(self) -> str:
        return f"{self.family} {self.name!r}"


@dataclass(frozen=True)
class Conflict:
    """Two pieces that must not be combined, why, and the nearest sound choice."""

    first: Piece
    second: Piece
    reason: str
    instead: str

    def __str__(self) -> str:
        return f"{self.first} does not compose with {self.second}: {self.reason} Instead: {self.instead}"


@dataclass(frozen=True)
class _Rule:
    first: Trait
    second: Trait
    reason: str
    instead: str


_RULES = (
    _Rule(
        Trait.STEP_LEVEL,
        Trait.OPAQUE_STEPS,
        "the algorithm has to change every local step, and this training hands over finished updates only.",
        "use an algorithm that acts on updates (fedavg, fedavgm, fedadam, fedyogi, fedadagrad).",
    ),
    _Rule(
        Trait.PLAIN_STEPS,
        Trait.ADAPTIVE_STEPS,
        "its control variates are computed as (w − y)/(Kη), which holds for plain SGD steps only.",
        "use train.optimizer = 'sgd' without momentum, or another strategy.",
    ),
    _Rule(
        Trait.VECTORISED,
        Trait.STEPWISE,
        "the engine needs training that is a pure function of (params, batch).",
        "use engine 'local' or 'processes'.",
    ),
    _Rule(
        Trait.VECTORISED,
        Trait.TIMED,
        "sites trained as one computation all end at the same moment, so a deadline means nothing.",
        "leave out cohort.deadline_s, or use engine 'processes'.",
    ),
    _Rule(
        Trait.RELAYS,
        Trait.SERVER_STEP,
        "no server step is made, so the algorithm would be another one.",
        "use fedavg or fedprox with lr = 1, or workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.RELAYS,
        Trait.CLIPS,
        "sites hand over whole models, and no update passes through the filter.",
        "leave the filter out, or use workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.RELAYS,
        Trait.ENCODES,
        "sites hand over whole models, and no update passes through the filter.",
        "leave the filter out, or use workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.RELAYS,
        Trait.STALE,
        "a late site has no turn to come back to.",
        "use cohort.late = 'discard'.",
    ),
    _Rule(
        Trait.RELAYS,
        Trait.VECTORISED,
        "sites take turns, so there is nothing to train at once.",
        "use engine 'local' or 'processes'.",
    ),
    _Rule(
        Trait.PRIVATE,
        Trait.RELAYS,
        "a whole model leaves each site, and no sum is made that noise could hide it in.",
        "use workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.PRIVATE,
        Trait.STALE,
        "a late update counts in a round that its site was not drawn for, so the accountant's sampling is another one.",
        "use cohort.late = 'discard'.",
    ),
    _Rule(
        Trait.PRIVATE,
        Trait.EXTRA_PARTS,
        "its parts share one bound, and the control variates would be noise for the most part.",
        "use fedavg, fedprox, fedavgm or an adaptive server optimiser.",
    ),
    _Rule(
        Trait.PRIVATE,
        Trait.UNPROTECTED,
        "its scores come from models that were trained on the same data without noise, and are shown.",
        "set baselines.local and baselines.central to false.",
    ),
    _Rule(
        Trait.PER_EXAMPLE,
        Trait.WHOLE_BATCHES,
        "no bound can be put on what one example does.",
        "use a recipe that Hansa trains itself, hansa.client.prepare in a script and recipe.steps = 'prepared', or "
        "mechanism 'local' or 'central', which bound a site's whole update.",
    ),
    _Rule(
        Trait.PER_EXAMPLE,
        Trait.BATCH_CLIP,
        "train.clip_grad would cut off the noise together with the gradient; each example is clipped already.",
        "leave out train.clip_grad; privacy.clip is the bound of an example.",
    ),
    _Rule(
        Trait.PER_EXAMPLE,
        Trait.UNPROTECTED,
        "it trains on the same data once more, and what that spends is not in the plan.",
        "set baselines.local and baselines.central to false.",
    ),
    _Rule(
        Trait.MASKED,
        Trait.RELAYS,
        "a whole model goes from site to site, and there is no sum that masks could cancel in.",
        "use workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.MASKED,
        Trait.STALE,
        "the masks of a late update belong to a round whose sum is made, and cancel in no other.",
        "use cohort.late = 'discard'.",
    ),
    _Rule(
        Trait.MASKED,
        Trait.VECTORISED,
        "sites that are one computation have no updates of their own to mask.",
        "use engine 'local' or 'processes'.",
    ),
    _Rule(
        Trait.MASKED,
        Trait.ENCODES,
        "what travels are elements of a ring or ciphertexts, as wide whatever they were made from.",
        "leave the filter out; the step and range of [secure_aggregation] decide how wide.",
    ),
    _Rule(
        Trait.MASKED,
        Trait.UNPROTECTED,
        "a model of one site's own training would be judged and shown.",
        "set baselines.local and baselines.central to false.",
    ),
    _Rule(
        Trait.ENCRYPTED,
        Trait.MASKED,
        "each makes a sum of its own kind: masks are added as they are, and cancel in no ciphertext.",
        "keep secure_aggregation, where no single site holds a key to the sum; or homomorphic_encryption, where sites "
        "are few and one of them is trusted with sums.",
    ),
    _Rule(
        Trait.ADAPTERS_ONLY,
        Trait.WHOLE_MODEL,
        "an encrypted number takes 32 bytes, so a whole model is eight times what it is, for every site and round.",
        "give model.adapter, or use secure_aggregation, or pay for it with homomorphic_encryption.full_model = true.",
    ),
    _Rule(
        Trait.NEEDS_EACH,
        Trait.MASKED,
        "the server sees a sum only, so it can neither compare updates nor hold one to a bound.",
        "leave out strategy.robust, or secure_aggregation or homomorphic_encryption: whether you fear the sites or the "
        "server is for you to say.",
    ),
    _Rule(
        Trait.NEEDS_EACH,
        Trait.PRIVATE,
        "noise is measured for a sum of bounded updates, which the rule's result is not, and noise that sites add "
        "themselves is most of what it would compare.",
        "leave strategy.robust out, as privacy.clip bounds what each site does already; or use mechanism 'dp-sgd'.",
    ),
    _Rule(
        Trait.NEEDS_EACH,
        Trait.EXTRA_PARTS,
        "a lie in the other parts would get around a rule for the update, and what it chooses there means nothing.",
        "use a strategy whose only part is the update (fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad).",
    ),
    _Rule(
        Trait.NEEDS_EACH,
        Trait.RELAYS,
        "a site hands its model straight to the next, and no updates lie side by side.",
        "use workflow 'scatter-gather'.",
    ),
    _Rule(
        Trait.NEEDS_EACH,
        Trait.STALE,
        "an update that started from an older model is far from all others, or passes for far, though nobody lied.",
        "use cohort.late = 'discard'.",
    ),
    _Rule(
        Trait.EXTRA_PARTS,
        Trait.STALE,
        "a part from an older round would be added to a newer state.",
        "use cohort.late = 'discard', or a strategy whose only part is the update.",
    ),
)

_ORDER = (Trait.CLIPS, Trait.WEIGHS, Trait.ENCODES)


def conflicts(pieces: Iterable[Piece]) -> list[Conflict]:
    """Return every unsound pair among ``pieces``, in the order of the rules."""
    pieces = list(pieces)
    found = [
        Conflict(a, b, rule.reason, rule.instead)
        for rule in _RULES
        for a in pieces
        for b in pieces
        if a is not b and rule.first in a.traits and rule.second in b.traits
    ]
    filters = [piece for piece in pieces if piece.family == "filter" and piece.traits.intersection(_ORDER)]
    for i, later in enumerate(filters):
        for earlier in filters[:i]:
            if _stage(later) < _stage(earlier):
                found.append(
                    Conflict(
                        later,
                        earlier,
                        "a bound or a weight applied after that step no longer holds for what is sent.",
                        f"put {later.name!r} before {earlier.name!r}.",
                    )
                )
    return found


def _stage(piece: Piece) -> int:
    return max(i for i, trait in enumerate(_ORDER) if trait in piece.traits)


def check_fit(pieces: Iterable[Piece]) -> None:
    """Raise FitError with every reason if the pieces do not compose; never drops or changes one."""
    found = conflicts(pieces)
    if found:
        raise FitError("\n".join(str(conflict) for conflict in found))
