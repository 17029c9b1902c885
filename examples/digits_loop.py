# SPDX-License-Identifier: Apache-2.0
"""A federation in your own loop: FedAvg against SCAFFOLD on digits, ten sites that know two digits each.

    python examples/digits_loop.py

The data ship with scikit-learn. Ten sites train as one vectorised computation.
"""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hansa


def sites(x, y, count=10):
    """Give each of ``count`` sites two shards of examples sorted by their digit."""
    order = np.argsort(y, kind="stable")
    shards = np.array_split(order, 2 * count)
    turns = np.random.default_rng(0).permutation(2 * count)
    mine = {f"site-{i}": np.concatenate([shards[turns[2 * i]], shards[turns[2 * i + 1]]]) for i in range(count)}
    return {name: (x[rows], y[rows]) for name, rows in mine.items()}


def accuracy(outputs, targets):
    """Return whether each row's highest output is its digit."""
    return (outputs.argmax(-1) == targets).float()


def main(rounds=15):
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    train, held_out = sites(x[360:], digits.target[360:]), {"everyone": (x[:360], digits.target[:360])}
    finals = {}
    for strategy in (hansa.fedavg(), hansa.scaffold()):
        federation = hansa.process(
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
            strategy,
            client_optimizer=hansa.sgd(0.1),
            loss=cross_entropy,
            metrics={"accuracy": accuracy},
            steps=20,
            engine="batched",
        )
        state = federation.initialize()
        for _ in range(rounds):
            state, _ = federation.next(state, train)
        finals[strategy.name] = federation.evaluate(state, held_out)["accuracy"]
        print(f"{strategy.name:10} accuracy after {state.round} rounds: {finals[strategy.name]:.3f}")
    return finals


if __name__ == "__main__":
    main()
