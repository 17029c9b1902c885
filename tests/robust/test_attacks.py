# SPDX-License-Identifier: Apache-2.0
"""Attacks for real: 3 of 15 sites that lie about digits, in the benchmark's own federation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "robust_table.py"
ROUNDS = 12


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("robust_benchmark", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["robust_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["robust_benchmark"]


ATTACKS = ("sign flip × 5", "Gaussian", "ALIE", "IPM", "label flip", "back door")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "geometric-median", "multi-krum"])
def test_rules_learn_beside_sites_that_lie(table, rule, attack):
    accuracy, taken, _ = table.trained("near-IID", table.RULES[rule], attack, 0, ROUNDS)
    assert accuracy > 0.85
    if attack == "back door":  # five times their own update brings liars into a geometric median with some weight
        assert taken < (0.6 if rule == "geometric-median" else 0.3)


def test_every_attack_is_tried(table):
    assert tuple(table.ATTACKS) == ATTACKS


def test_a_mean_is_carried_off(table):
    """The attacks are real: what stands above falls here."""
    accuracy, _, _ = table.trained("near-IID", None, "sign flip × 5", 0, ROUNDS)
    assert accuracy < 0.3
    _, taken, _ = table.trained("near-IID", None, "back door", 0, ROUNDS)
    assert taken > 0.8


def test_a_bound_on_norms_keeps_a_mean_from_being_carried_off(table):
    accuracy, _, _ = table.trained("near-IID", table.RULES["mean, norms ≤ 1"], "sign flip × 5", 0, ROUNDS)
    assert accuracy > 0.5


def test_multi_krum_names_those_who_flip(table):
    _, _, notes = table.trained("near-IID", table.RULES["multi-krum"], "sign flip × 5", 0, ROUNDS)
    assert len(notes) == ROUNDS
    assert {note["left_out"] for note in notes} == {"site-01, site-06, site-11"}
