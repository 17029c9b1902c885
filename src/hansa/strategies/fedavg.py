# SPDX-License-Identifier: Apache-2.0
"""FedAvg: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data",
arXiv:1602.05629, Algorithm 1.

    site    y_i ← E epochs or K steps of SGD from w;   Δ_i = y_i − w
    server  w ← w + η Σ n_i Δ_i / Σ n_i                (η = 1)

The fixed point is biased under client drift. For quadratics f_i = a_i/2 (w − b_i)² and K full-gradient steps of
size l it is w* = Σ n_i s_i b_i / Σ n_i s_i with s_i = 1 − (1 − l a_i)^K, which a test holds it to.
"""

from __future__ import annotations

from hansa.core.fit import Trait
from hansa.core.optimizer import Optimizer, sgd
from hansa.core.strategy import Notes, Strategy, descend
from hansa.core.tree import Parts
from hansa.core.values import Aggregate, Model


def fedavg(lr: float = 1.0, server_optimizer: Optimizer | None = None) -> Strategy:
    """Return FedAvg.

    Args:
        lr: the server's learning rate η.
        server_optimizer: takes minus the mean update as its gradient; plain SGD with ``lr`` by default.
    """
    optimizer = server_optimizer or sgd(lr)
    return averaging("fedavg", optimizer)


def averaging(name: str, optimizer: Optimizer) -> Strategy:
    """Return the strategy that averages plain updates and applies the mean by ``optimizer``."""

    def init(model: Model) -> Parts:
        return optimizer.init(model.params)

    def step(model: Model, state: Parts, aggregate: Aggregate) -> tuple[Model, Parts, Notes]:
        model, state = descend(optimizer, model, state, aggregate.mean("delta"))
        return model, state, {}

    traits = {Trait.WHOLE_WORK}
    if not (optimizer.plain and optimizer.lr == 1):
        traits.add(Trait.SERVER_STEP)
    return Strategy(name, init=init, step=step, traits=frozenset(traits))
