# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD's gain under label skew, with the benchmark's own code: digits, 10 sites of two label shards each."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[2] / "benchmarks" / "scaffold_table.py"


def load():
    spec = importlib.util.spec_from_file_location("scaffold_table", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaffold_table"] = module
    spec.loader.exec_module(module)
    return module


def test_scaffold_needs_at_most_1_in_1_8_of_fedavgs_rounds():
    table = load()
    train, _ = table.digits(0)
    assert len(train) == 10
    assert max(len(set(y.tolist())) for _, y in train.values()) <= 4
    mean = {}
    for name in ("fedavg", "scaffold"):
        runs = [table.accuracies(table.STRATEGIES[name], seed, 60, stop=table.TARGET) for seed in range(5)]
        reached = [table.rounds_to(table.TARGET, run) for run in runs]
        assert None not in reached, f"{name} did not reach the target"
        mean[name] = np.mean(reached)
    assert mean["scaffold"] * 1.8 <= mean["fedavg"], mean
