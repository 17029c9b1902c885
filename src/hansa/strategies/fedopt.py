# SPDX-License-Identifier: Apache-2.0
"""FedAdam, FedYogi, FedAdagrad: Reddi et al. 2021, "Adaptive federated optimization", arXiv:2003.00295,
Algorithm 2.

    site    as FedAvg
    server  m ← β₁m + (1 − β₁)Δ
            v ← v + Δ²                                  (adagrad)
                v − (1 − β₂)Δ² sign(v − Δ²)             (yogi)
                β₂v + (1 − β₂)Δ²                        (adam)
            w ← w + η m / (√v + τ)
"""

from __future__ import annotations

from hansa.core.optimizer import adagrad, adam, yogi
from hansa.core.strategy import Strategy
from hansa.strategies.fedavg import averaging


def fedadam(lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Strategy:
    """Return FedAdam (``lr`` is the server's η; the paper finds 1e-2 to 1e-1 good)."""
    return averaging("fedadam", adam(lr, beta1, beta2, tau))


def fedyogi(lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Strategy:
    """Return FedYogi."""
    return averaging("fedyogi", yogi(lr, beta1, beta2, tau))


def fedadagrad(lr: float = 1e-1, beta1: float = 0.0, tau: float = 1e-3) -> Strategy:
    """Return FedAdagrad."""
    return averaging("fedadagrad", adagrad(lr, beta1, tau))
