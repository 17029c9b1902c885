# SPDX-License-Identifier: Apache-2.0
"""Optimisers as pairs of pure functions over trees; one value serves the server and a site's local steps.

On the server the "gradient" is minus the mean update (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2):

    adagrad  v ← v + g²                        adam  v ← β₂v + (1 − β₂)g²
    yogi     v ← v − (1 − β₂)g² sign(v − g²)   step  w ← w − η m / (√v + τ),  m ← β₁m + (1 − β₁)g

without bias correction, as in the paper; ``bias_correction=True`` gives Loshchilov & Hutter's AdamW for local
steps (arXiv:1711.05101). Its corrections 1 − βᵗ are kept as running averages of ones: that is the same number,
and, other than a power of β in float32, exact to rounding from the first step on.
Only operators are applied to the leaves, so NumPy, torch and JAX arrays all work, and keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hansa.errors import JobError

AnyTree = Mapping[str, Any]
State = Mapping[str, AnyTree]


@dataclass(frozen=True)
class Optimizer:
    """``init(params) -> state`` and ``update(params, grads, state) -> (params, state)``.

    Attributes:
        name: for messages and records.
        lr: the learning rate η.
        plain: whether a step is ``w − η g`` and nothing else, which SCAFFOLD's controls assume.
        init: makes the state, named trees.
        update: one step.
    """

    name: str
    lr: float
    plain: bool
    init: Callable[[AnyTree], State]
    update: Callable[[AnyTree, AnyTree, State], tuple[AnyTree, State]]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise JobError(f"{name} must be positive and finite, not {value}.")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise JobError(f"{name} must be in [0, 1), not {value}.")


def _zeros(params: AnyTree) -> AnyTree:
    return {name: leaf * 0 for name, leaf in params.items()}


def sgd(lr: float = 1.0, momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Return ``v ← βv + g; w ← w − ηv`` (heavy ball), or Nesterov's ``w ← w − η(g + βv)``."""
    _positive(lr=lr)
    _fraction(momentum=momentum)
    if nesterov and not momentum:
        raise JobError("nesterov needs a momentum above 0.")

    def init(params: AnyTree) -> State:
        return {"momentum": _zeros(params)} if momentum else {}

    def update(params: AnyTree, grads: AnyTree, state: State) -> tuple[AnyTree, State]:
        if not momentum:
            return {n: w - lr * grads[n] for n, w in params.items()}, state
        v = {n: momentum * state["momentum"][n] + g for n, g in grads.items()}
        step = {n: g + momentum * v[n] for n, g in grads.items()} if nesterov else v
        return {n: w - lr * step[n] for n, w in params.items()}, {"momentum": v}

    return Optimizer("sgd", lr, plain=not momentum, init=init, update=update)


def _adaptive(
    name: str,
    lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Any, Any], Any],
    weight_decay: float = 0.0,
    correction: tuple[float, float] | None = None,
) -> Optimizer:
    _positive(lr=lr, tau=tau)
    _fraction(beta1=beta1)
    if not 0 <= weight_decay < math.inf:
        raise JobError(f"weight_decay must be at least 0 and finite, not {weight_decay}.")

    def init(params: AnyTree) -> State:
        state: dict[str, AnyTree] = {"m": _zeros(params), "v": _zeros(params)}
        if correction:
            zero = next(iter(params.values())).reshape(-1)[:1].sum() * 0
            state["correction"] = {"m": zero, "v": zero}
        return state

    def update(params: AnyTree, grads: AnyTree, state: State) -> tuple[AnyTree, State]:
        m = {n: beta1 * state["m"][n] + (1 - beta1) * g for n, g in grads.items()}
        v = {n: second(state["v"][n], g * g) for n, g in grads.items()}
        new: dict[str, AnyTree] = {"m": m, "v": v}
        m_scale: Any = 1.0
        v_scale: Any = 1.0
        if correction:
            seen = state["correction"]
            ones = {n: beta * seen[n] + (1 - beta) for n, beta in zip("mv", correction, strict=True)}
            new["correction"] = ones
            m_scale = 1 / ones["m"]
            v_scale = 1 / ones["v"]
        stepped = {
            n: w * (1 - lr * weight_decay) - lr * (m[n] * m_scale) / ((v[n] * v_scale) ** 0.5 + tau)
            for n, w in params.items()
        }
        return stepped, new

    return Optimizer(name, lr, plain=False, init=init, update=update)


def adam(
    lr: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weight_decay: float = 0.0,
    bias_correction: bool = False,
) -> Optimizer:
    """Return FedAdam's server optimiser, or AdamW with ``bias_correction=True`` and ``tau`` as its epsilon."""
    _fraction(beta2=beta2)
    correction = (beta1, beta2) if bias_correction else None
    return _adaptive("adam", lr, beta1, tau, lambda v, g2: beta2 * v + (1 - beta2) * g2, weight_decay, correction)


def adagrad(lr: float = 1e-1, beta1: float = 0.0, tau: float = 1e-3) -> Optimizer:
    """Return FedAdagrad's server optimiser."""
    return _adaptive("adagrad", lr, beta1, tau, lambda v, g2: v + g2)


def yogi(lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """Return FedYogi's server optimiser."""
    _fraction(beta2=beta2)

    def second(v: Any, g2: Any) -> Any:
        step = (1 - beta2) * g2
        return v + step * (v < g2) - step * (v > g2)

    return _adaptive("yogi", lr, beta1, tau, second)
