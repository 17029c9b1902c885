# SPDX-License-Identifier: Apache-2.0
"""What each recipe's metrics are computed from, and the largest that a site's sums of it can be: names, no framework.

A job under masks declares these (:mod:`hansa.runs.masking`), so that its federation's metrics are those of any job.
A script says only at run time which metrics it has; ``loss``, ``accuracy`` and the one that selects the best round have
a place.

Counts end at 2^26 held-out or trained examples (words, tokens) a site, sums of losses at 2^31. In a ring of 64 bits
their steps are then 2^-26 and 2^-21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hansa.core.config import Job

COUNT = float(1 << 26)
TOTAL = float(1 << 31)

_WORDS = ("tag_hits", "tag_predictions", "tag_truths", "entity_hits", "entity_predictions", "entity_truths")


def _sums(*counts: str, total: str = "loss_sum") -> dict[str, float]:
    return {total: TOTAL, **dict.fromkeys(counts, COUNT)}


def _classification(job: Job) -> dict[str, float]:
    labels = len(job.data.labels or ()) if job.data else 0
    confusion = [f"{kind}_{label}" for kind in ("tp", "fp", "fn") for label in range(labels)]
    return _sums("count", "correct", *confusion)


def _script(job: Job) -> dict[str, float]:
    names = sorted({"loss", "accuracy", job.evaluation.metric})
    return {**dict.fromkeys(names, TOTAL), **{f"{name}.count": COUNT for name in names}}


_DECLARED: Mapping[str, Callable[[Job], dict[str, float]]] = {
    "causal-lm": lambda job: _sums("tokens", "correct"),
    "sequence-classification": _classification,
    "image-classification": _classification,
    "token-classification": lambda job: _sums("seen", "words", "correct", *_WORDS),
    "tabular-classification": lambda job: _sums("examples", "accuracy", total="loss"),
    "script": _script,
}


def declared(job: Job) -> dict[str, float] | None:
    """Return sum -> its largest magnitude at a site, or None for a recipe that is not Hansa's own."""
    of_recipe = _DECLARED.get(job.recipe.name)
    return None if of_recipe is None else of_recipe(job)
