# SPDX-License-Identifier: Apache-2.0
"""What a site does with a plan: train under the strategy's client half, then pass the update through the filters."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hansa.core import filter as filters
from hansa.core import tree as trees
from hansa.core.filter import Filter, Given
from hansa.core.ports import Correction, Program, Work
from hansa.core.strategy import Strategy
from hansa.core.tree import Parts, Tree
from hansa.core.values import WEIGHT_SCALE, Plan, Update
from hansa.errors import DataError, NonFiniteError, SiteError

Memory = Mapping[str, Parts]
"""What a site keeps from round to round: the strategy's parts, and each filter's, by owner."""

STRATEGY = "strategy"


def perform(
    program: Program, strategy: Strategy, pieces: Sequence[Filter], plan: Plan, site: str, memory: Memory
) -> tuple[Update, Memory, Tree]:
    """Do one plan at one site.

    Returns:
        the update as it is sent, the site's new memory, and the trained parameters where the plan has them passed on.

    Raises:
        NonFiniteError: the loss, the parameters or a metric became NaN or infinite; nothing is to be sent.
        DataError: the site trained on nothing.
    """
    begun = time.perf_counter()
    if plan.task == "evaluate":
        sums = program.evaluate(site, plan)
        return _evaluated(plan, site, sums, max(0.0, time.perf_counter() - begun)), memory, plan.params
    context = begin(strategy, plan, memory)
    correction = None
    if strategy.rule.adjust:
        reads = context.keys() if strategy.rule.reads is None else strategy.rule.reads
        correction = Correction({part: trees.arrays(context[part]) for part in reads}, strategy.rule.adjust)
    work = program.train(site, plan, correction)
    trained = work.params if plan.outbox is not None else {}
    finished = finish(strategy, plan, site, context, work)
    work = replace(work, params={})  # let go of: a large model's filters then have room
    update, memory = encode(strategy, pieces, plan, site, work, finished, memory)
    return replace(update, seconds=max(0.0, time.perf_counter() - begun)), memory, trained


def begin(strategy: Strategy, plan: Plan, memory: Memory) -> Parts:
    """Return what the strategy's client half needs at every step."""
    return strategy.rule.begin(trees.lazily(plan.params), _lazily(plan.parts), _lazily(memory.get(STRATEGY, {})))


def finish(strategy: Strategy, plan: Plan, site: str, context: Parts, work: Work) -> tuple[Parts, Parts]:
    """Return the parts of a site's update, before any filter, and what the strategy keeps at the site.

    Raises:
        NonFiniteError: a metric is NaN or infinite.
        DataError: the site trained on nothing.
    """
    _check(work, plan, site)
    return strategy.rule.finish(context, trees.lazily(plan.params), trees.lazily(work.params), work.steps)


def encode(
    strategy: Strategy,
    pieces: Sequence[Filter],
    plan: Plan,
    site: str,
    work: Work,
    finished: tuple[Parts, Parts],
    memory: Memory,
) -> tuple[Update, Memory]:
    """Pass what :func:`finish` returned through the filters: the update that is sent, the memory that is kept.

    Raises:
        NonFiniteError: a tensor of the update is NaN or infinite; nothing is to be sent. Tensors of a large update are
            computed when they are read, and raise it then.
    """
    parts, kept = finished
    update = Update(
        site=site,
        round=plan.round,
        version=plan.version,
        parts=parts,
        weight=work.num_examples / WEIGHT_SCALE,
        sums=dict(work.sums),
        completed=work.completed,
        logged=work.logged,
    )
    lazy_memory = {owner: _lazily(own) for owner, own in memory.items()}
    update, remembered = filters.run(pieces, update, Given(strategy.weighed, plan.parts), lazy_memory)

    def error(name: str) -> NonFiniteError:
        return NonFiniteError(
            f"The update's tensor {name!r} is NaN or infinite. Lower train.lr or set train.clip_grad.",
            site=site,
            round=plan.round,
        )

    sent = {}
    for part, tree in update.parts.items():
        if any(map(trees.is_leaf, tree.values())):
            sent[part] = trees.arrays(trees.checked(tree, error))
        else:
            name = trees.first_non_finite(tree)
            if name is not None:
                raise error(name)
            sent[part] = tree
    return replace(update, parts=sent), {**remembered, STRATEGY: kept} if kept else remembered


def _lazily(parts: Parts) -> Parts:
    return {part: trees.lazily(tree) for part, tree in parts.items()}


def _evaluated(plan: Plan, site: str, sums: Mapping[str, float], seconds: float) -> Update:
    for name, value in sums.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The evaluation's {name} is {value}: the model has diverged.", site=site, round=plan.round
            )
    return Update(site, plan.round, plan.version, {}, 1.0, dict(sums), 1.0, seconds)


def _check(work: Work, plan: Plan, site: str) -> None:
    if not 0 < work.num_examples < math.inf:
        reason = f"The site trained on {work.num_examples:g} examples; that is no weight."
        raise DataError(reason, site=site, round=plan.round)
    if work.steps.count < 1 or not 0 < work.completed <= 1:
        raise SiteError("The site made no step.", site=site, round=plan.round)
    for name, value in work.sums.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The training {name} is {value}. Lower train.lr or set train.clip_grad.",
                site=site,
                round=plan.round,
            )
