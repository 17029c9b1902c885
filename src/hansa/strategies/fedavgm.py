# SPDX-License-Identifier: Apache-2.0
"""FedAvgM: Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated visual
classification", arXiv:1909.06335, §4.3.

    site    as FedAvg
    server  v ← βv + Δ;   w ← w + ηv                   (β = 0.9; 0.97 to 0.997 under strong skew)

With ``nesterov=True``, η = 0.7 and AdamW at the sites it is DiLoCo's outer step (arXiv:2311.08105).
"""

from __future__ import annotations

from hansa.core.optimizer import sgd
from hansa.core.strategy import Strategy
from hansa.strategies.fedavg import averaging


def fedavgm(lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False) -> Strategy:
    """Return FedAvg with server momentum.

    Args:
        lr: the server's learning rate η.
        momentum: β in [0, 1).
        nesterov: look ahead, w ← w + η(Δ + βv).
    """
    return averaging("fedavgm", sgd(lr, momentum, nesterov))
