# SPDX-License-Identifier: Apache-2.0
"""What a learning algorithm is: a value made of pure functions, with a server half and a client half.

    server   init ─> state        sent(state) ─> parts of the plan        step(model, state, aggregate)
    client   begin(start, sent, memory) ─> context
             adjust(context, params, grads) ─> grads                      before every local step
             finish(context, start, end, steps) ─> parts of the update, memory

``adjust`` uses operators only, so it runs on the trainer's own arrays; the others see NumPy trees, whose leaves are
:class:`hansa.core.lazy.Leaf` where the model is large: they too are combined by operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hansa.core import tree as trees
from hansa.core.each import Rule
from hansa.core.fit import Trait
from hansa.core.optimizer import Optimizer
from hansa.core.tree import Array, Layout, Parts, Tree
from hansa.core.values import Aggregate, Model


@dataclass(frozen=True)
class Steps:
    """What local training did: ``count`` steps, whose learning rates add up to ``lr_sum`` (Kη if constant)."""

    count: int
    lr_sum: float


def _nothing(start: Tree, sent: Parts, memory: Parts) -> Parts:
    return {}


def delta(context: Parts, start: Tree, end: Tree, steps: Steps) -> tuple[Parts, Parts]:
    """Return the plain update, ``end − start`` of every floating tensor in its own dtype, and no memory."""
    return {"delta": difference(start, end)}, {}


def difference(start: Tree, end: Tree) -> dict[str, Array]:
    """Return ``end − start`` of the floating tensors, computed in float32 or wider, in their own dtype."""
    result = {}
    for name, before in trees.floating(start).items():
        wide = trees.wide(before.dtype)
        moved = end[name].astype(wide, copy=False) - before.astype(wide, copy=False)
        result[name] = moved.astype(before.dtype, copy=False)
    return result


@dataclass(frozen=True)
class ClientRule:
    """The client half. ``adjust`` is None where local steps are left alone.

    ``reads`` names the parts of the context that ``adjust`` looks at, all by default: only they go to where it runs.
    """

    begin: Callable[[Tree, Parts, Parts], Parts] = _nothing
    adjust: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None
    finish: Callable[[Parts, Tree, Tree, Steps], tuple[Parts, Parts]] = delta
    reads: frozenset[str] | None = None


Notes = Mapping[str, Any]


@dataclass(frozen=True)
class Strategy:
    """A federated algorithm.

    Attributes:
        name: as in the job.
        init: the server's state for the first model, as named trees, so that it can be checkpointed.
        sent: what of the state every plan carries beside the model.
        rule: the client half.
        step: turns (model, state, aggregate) into the next model, the next state, and notes for the record.
        weighed: uploaded part -> True if it is multiplied by the site's weight, False if every site counts once.
        traits: what :func:`hansa.core.fit.check_fit` needs to know.
        select: ``(sites, round)`` -> who is asked, in place of the cohort's policy; nobody is an answer.
        bound: from the state, the joint L2 norm that no site's update may exceed; None for no bound.
        extra: uploaded parts that do not have the model's layout, and theirs; where there is a bound, each has a norm
            of at most 1.
        combine: what makes one update of the sites' in place of the sum; then no part is weighed, and the aggregate is
            the rule's result.
    """

    name: str
    init: Callable[[Model], Parts]
    step: Callable[[Model, Parts, Aggregate], tuple[Model, Parts, Notes]]
    sent: Callable[[Parts], Parts] = lambda state: {}
    rule: ClientRule = field(default_factory=ClientRule)
    weighed: Mapping[str, bool] = field(default_factory=lambda: {"delta": True})
    traits: frozenset[Trait] = frozenset()
    select: Callable[[Sequence[str], int], tuple[str, ...]] | None = None
    bound: Callable[[Parts], float | None] = lambda state: None
    extra: Mapping[str, Layout] = field(default_factory=dict)
    combine: Rule | None = None


def descend(optimizer: Optimizer, model: Model, state: Parts, mean: Tree) -> tuple[Model, Parts]:
    """Apply ``optimizer`` to the model with minus the mean update as the gradient."""
    grads = trees.Derived(mean.keys(), lambda name: trees.tensor(-mean[name]))
    moving = {name: model.params[name] for name in mean}
    params, state = optimizer.update(moving, grads, state)
    kept = {name: leaf.astype(moving[name].dtype, copy=False) for name, leaf in params.items()}
    return model.advance(kept), state
