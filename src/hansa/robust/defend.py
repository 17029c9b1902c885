# SPDX-License-Identifier: Apache-2.0
"""A strategy behind a robust rule.

    site    Δ ← Δ · min(1, C/‖Δ‖)  where there is a bound C; it is not multiplied by a weight
    server  rejects ‖Δ‖ > C;  x ← rule(Δ_1 ... Δ_n);  the strategy's own step takes x for the mean

The bound is norm clipping as in Sun et al. 2019, "Can you really backdoor federated learning?", arXiv:1911.07963. The
server holds every update to it, as a site that lies does not clip.

| case | result |
|---|---|
| an update above C, by more than rounding to half precision | its site is rejected in this round |
| an update that is NaN or infinite | rejected, as without a rule |
| a strategy with further parts (SCAFFOLD), beside masks or noise, late updates | refused by the fit check |
| fewer updates in a round than the rule needs | QuorumError; the model stays |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hansa.core import bound
from hansa.core.config import RobustSection
from hansa.core.each import Rule
from hansa.core.strategy import Steps, Strategy
from hansa.core.tree import Parts, Tree
from hansa.robust.coordinates import mean, median, trimmed_mean
from hansa.robust.geometric_median import geometric_median
from hansa.robust.krum import krum, multi_krum

ROUNDING = 1 + 2.0**-8
"""What a clipped update's norm may exceed the bound by, through rounding to half precision."""

RULES: Mapping[str, Callable[[int], Rule]] = {
    "mean": mean,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
}
"""The rules by their names in a job, each made for a number of lies."""


def defended(strategy: Strategy, section: RobustSection) -> Strategy:
    """Return ``strategy`` behind what the job asks for."""
    return robust(strategy, RULES[section.rule](section.malicious), section.max_norm)


def robust(strategy: Strategy, rule: Rule, max_norm: float | None = None) -> Strategy:
    """Return ``strategy`` with ``rule`` in place of the mean.

    Args:
        strategy: an algorithm whose only part is the update.
        rule: one of this package, or your own.
        max_norm: the largest L2 norm of an update; sites clip to it.
    """
    changed = replace(strategy, combine=rule, weighed=dict.fromkeys(strategy.weighed, False))
    if max_norm is None:
        return changed

    def finish(context: Parts, start: Tree, end: Tree, steps: Steps) -> tuple[Parts, Parts]:
        parts, memory = strategy.rule.finish(context, start, end, steps)
        return bound.clip(parts, max_norm)[0], memory

    return replace(changed, rule=replace(strategy.rule, finish=finish), bound=lambda state: max_norm * ROUNDING)
