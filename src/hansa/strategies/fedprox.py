# SPDX-License-Identifier: Apache-2.0
"""FedProx: Li et al. 2020, "Federated optimization in heterogeneous networks", arXiv:1812.06127, Algorithm 2.

site    minimise f_i(y) + μ/2 ‖y − w‖²  inexactly:  g ← g + μ(y − w) at every local step
server  as FedAvg; a site that did part of its work is averaged in, not dropped
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hansa.core import tree as trees
from hansa.core.fit import Trait
from hansa.core.strategy import ClientRule, Strategy
from hansa.core.tree import Parts, Tree
from hansa.errors import JobError
from hansa.strategies.fedavg import fedavg


def fedprox(mu: float = 0.01, lr: float = 1.0) -> Strategy:
    """Return FedProx.

    Args:
        mu: the proximal term's weight μ ≥ 0; 0 is FedAvg that accepts partial work.
        lr: the server's learning rate.
    """
    if mu < 0:
        raise JobError(f"strategy.mu must not be negative, it is {mu}.")

    def begin(start: Tree, sent: Parts, memory: Parts) -> Parts:
        return {"start": trees.floating(start)}

    def adjust(context: Mapping[str, Any], params: Mapping[str, Any], grads: Mapping[str, Any]) -> Mapping[str, Any]:
        start = context["start"]
        return {name: g + mu * (params[name] - start[name]) for name, g in grads.items()}

    averaged = fedavg(lr)
    return Strategy(
        "fedprox",
        init=averaged.init,
        step=averaged.step,
        rule=ClientRule(begin=begin, adjust=adjust),
        traits=averaged.traits - {Trait.WHOLE_WORK} | {Trait.STEP_LEVEL},
    )
