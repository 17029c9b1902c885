# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning",
arXiv:1910.06378, Algorithm 1 with option II.

    site    y ← y − η_l (g − c_i + c) at every step;   c_i⁺ = c_i − c + (w − y)/(K η_l)
            sends Δ_i = y − w and c_i⁺ − c_i; keeps c_i⁺
    server  w ← w + η_g mean(Δ_i);                     c ← c + (m/N) mean(c_i⁺ − c_i)       (plain means)
                                                       c ← c W/W⁺ + Σ w_i (c_i⁺ − c_i) / W⁺ (weighed means)

K η_l is the sum of the learning rates of the steps made, so schedules and partial work are exact.

Whatever the mean of the updates, the fixed point is where the *controls'* mean vanishes. The paper's plain means
therefore minimise Σ f_i / N, an objective other than FedAvg's Σ n_i f_i / Σ n_i when sites differ in size. Both
means are weighed by examples here unless ``objective = "sites"`` asks for the paper's.

With weights, c is Σ w_i c_i over *all* sites divided by all weights W. Where a round asks some only, W is not known: it
is N times the mean weight of all updates so far. An error in W makes c a little too long or short for a while; the sum
itself stays exact, so the fixed point is where it vanishes, whoever was asked.

Guard. SCAFFOLD is not uniformly safe (an independent reproduction has it at 33.8 ± 41 where FedAvg has 78.1).
A round whose mean update is not finite, or is longer than ``guard`` times the longest of the first ``WARM_UP``
rounds, is not applied: the model stays, c and every c_i start again from zero, and the record says so.

| case | result |
|---|---|
| guard trips | model unchanged, controls zero everywhere, note ``guard`` |
| a site asked for the first time, or whose last update was not accepted | its older c_i, or zero |
| momentum or Adam at the sites | refused by the fit check |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from hansa.core import tree as trees
from hansa.core.fit import Trait
from hansa.core.optimizer import sgd
from hansa.core.strategy import ClientRule, Notes, Steps, Strategy, descend, difference
from hansa.core.tree import Parts, Tree
from hansa.core.values import Aggregate, Model
from hansa.errors import JobError

WARM_UP = 3
"""Rounds whose mean updates set the guard's yardstick."""


def scaffold(lr: float = 1.0, guard: float = 10.0, objective: Literal["examples", "sites"] = "examples") -> Strategy:
    """Return SCAFFOLD.

    Args:
        lr: the server's learning rate η_g.
        guard: how many times longer than in the first rounds a mean update may become.
        objective: what is minimised: the mean loss over all examples, or over sites as in the paper.
    """
    if not guard > 1:
        raise JobError(f"strategy.guard must be above 1, it is {guard}.")
    optimizer = sgd(lr)

    def init(model: Model) -> Parts:
        return {
            "control": _zero_control(model),
            "guard": {"longest": np.zeros(()), "rounds": np.zeros((), np.int64)},
            "seen": {"weight": np.zeros(()), "count": np.zeros(())},
        }

    def step(model: Model, state: Parts, aggregate: Aggregate) -> tuple[Model, Parts, Notes]:
        mean = aggregate.mean("delta")
        length = trees.norm(mean)
        longest = float(state["guard"]["longest"])
        rounds = int(state["guard"]["rounds"])
        if not math.isfinite(length) or (rounds >= WARM_UP and length > guard * longest):
            note = (
                f"the mean update's norm is {length:.3g}, more than {guard:g} times the {longest:.3g} of the "
                f"first rounds: not applied, and all control variates start again from zero"
            )
            return model, {**state, "control": _zero_control(model)}, {"guard": note, "forget": True}
        model, _ = descend(optimizer, model, {}, mean)
        control, seen = _moved(state["control"], state["seen"], aggregate)
        if rounds < WARM_UP:
            longest = max(longest, length)
        yardstick = {"longest": np.asarray(longest), "rounds": np.asarray(rounds + 1)}
        return model, {"control": control, "guard": yardstick, "seen": seen}, {}

    return Strategy(
        "scaffold",
        init=init,
        sent=lambda state: {"control": state["control"]},
        rule=ClientRule(begin=_begin, adjust=_adjust, finish=_finish, reads=frozenset({"correction"})),
        step=step,
        weighed=dict.fromkeys(("delta", "control"), objective == "examples"),
        traits=frozenset({Trait.STEP_LEVEL, Trait.PLAIN_STEPS, Trait.STATEFUL, Trait.EXTRA_PARTS, Trait.SERVER_STEP}),
    )


def _moved(control: Tree, seen: Tree, aggregate: Aggregate) -> tuple[Tree, Tree]:
    """Return the server's control after a round, and the weights seen so far."""
    total = aggregate.weight if aggregate.weighed["control"] else aggregate.count
    weight, count = float(seen["weight"]) + total, float(seen["count"]) + aggregate.count
    everyones = aggregate.population * weight / count
    before = aggregate.population * float(seen["weight"]) / float(seen["count"]) if seen["count"] else everyones
    moved = aggregate.mean("control")
    kept, share = before / everyones, total / everyones
    now = {name: c.dtype.type(kept) * c + c.dtype.type(share) * moved[name] for name, c in control.items()}
    return now, {"weight": np.asarray(weight), "count": np.asarray(count)}


def _zero_control(model: Model) -> Tree:
    return trees.zeros_like(trees.floating(model.params))


def _begin(start: Tree, sent: Parts, memory: Parts) -> Parts:
    control = sent["control"]
    own = memory.get("control") or trees.zeros_like(control)
    return {"own": own, "correction": trees.subtract(control, own)}


def _adjust(context: Mapping[str, Any], params: Mapping[str, Any], grads: Mapping[str, Any]) -> Mapping[str, Any]:
    correction = context["correction"]
    return {name: g + correction[name] for name, g in grads.items()}


def _finish(context: Parts, start: Tree, end: Tree, steps: Steps) -> tuple[Parts, Parts]:
    moved = difference(start, end)
    own = {
        name: trees.tensor(-leaf - moved[name].astype(leaf.dtype, copy=False) / leaf.dtype.type(steps.lr_sum))
        for name, leaf in context["correction"].items()
    }
    return {"delta": moved, "control": trees.subtract(own, context["own"])}, {"control": own}
