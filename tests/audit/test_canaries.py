# SPDX-License-Identifier: Apache-2.0
"""Canaries reach what is released through every mechanism, exactly as far as the clip lets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audits import job
from hansa.audit import canaries
from hansa.audit.subject import opened
from hansa.core import tree as trees
from hansa.errors import HansaError
from hansa.runs.progress import Silent
from tiny import BERT, rows

FAINT = 1e-3
CASES: dict[str, dict[str, Any]] = {
    "central": {"privacy": {"mechanism": "central"}},
    "central, weighed": {"privacy": {"mechanism": "central", "weight_cap": 7}},
    "central, sampled": {"privacy": {"mechanism": "central"}, "cohort": {"sample": 0.5}},
    "central, adaptive": {"privacy": {"mechanism": "central", "adaptive_clip": {"noise": 3.0}}},
    "central, masked": {"privacy": {"mechanism": "central"}, "secure_aggregation": {}},
    "local, encrypted": {
        "privacy": {"mechanism": "local"},
        "homomorphic_encryption": {"key_site": "a", "full_model": True},
    },
    "dp-ftrl": {"privacy": {"mechanism": "dp-ftrl", "separation": 2}},
    "distributed": {"privacy": {"mechanism": "distributed"}, "secure_aggregation": {}},
    "local": {"privacy": {"mechanism": "local"}, "cohort": {"sample": 2}},
    "half precision": {"privacy": {"mechanism": "central"}, "filters": [{"name": "cast", "dtype": "bfloat16"}]},
}


@pytest.mark.parametrize("case", CASES)
def test_every_canary_counts_for_one_clip(tmp_path: Path, case: str) -> None:
    values = CASES[case]
    privacy = {"clip": 0.5, "noise_multiplier": FAINT, "delta": 1e-5, **values["privacy"]}
    count = 12 if values.keys() & {"secure_aggregation", "homomorphic_encryption"} else 34
    with opened(job(tmp_path, **{**values, "privacy": privacy, "rounds": 2})) as subject:
        played = canaries.play(subject, count, np.random.default_rng(0), Silent())
    out = -1.0 if values["privacy"]["mechanism"] == "local" else 0.0
    expected = np.where(played.asked, np.where(played.included, 1.0, out), 0.0)
    close = 20 * FAINT if case != "half precision" else 0.02
    assert np.abs(played.signals - expected).max() < close
    assert played.asked.all() == (case not in ("central, sampled", "dp-ftrl"))
    assert 0 < played.included.sum() < count


@pytest.mark.parametrize("recipe", ["tabular-classification", "sequence-classification"])
def test_dp_sgd_s_canaries_are_in_the_batches_that_are_drawn(tmp_path: Path, recipe: str) -> None:
    lines = [{"features": [1.0] * 4, "text": "ab", "label": str(i % 2)} for i in range(60)]
    own = {"recipe": recipe, "model": BERT} if recipe == "sequence-classification" else {}
    plan = {"mechanism": "dp-sgd", "clip": 0.5, "noise_multiplier": FAINT, "delta": 1e-5, "accountant": "rdp"}
    one = {"train": {"a": rows(tmp_path / "one.jsonl", lines)}, "labels": ["0", "1"]}
    steps = {"steps": 20, "batch_size": 24, "lr": 0.1, "optimizer": "sgd"}
    with opened(job(tmp_path, privacy=plan, data=one, train=steps, **own)) as subject:
        rate = subject.plan.terms.rate
        played = canaries.play(subject, 34, np.random.default_rng(0), Silent())
    assert played.signals.shape == (40, 34)
    assert np.abs(played.signals[:, ~played.included]).max() < 20 * FAINT
    taken = played.signals[:, played.included]
    assert np.minimum(np.abs(taken), np.abs(taken - 1)).max() < 20 * FAINT
    assert abs((taken > 0.5).mean() - rate) < 6 * np.sqrt(rate * (1 - rate) / taken.size)


def test_a_canary_that_is_rejected_ends_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its clip an update of central noise is longer than the server accepts: nothing was audited."""
    monkeypatch.setattr("hansa.core.bound.clip", lambda parts, clip: (parts, 0.0))
    plan = {"mechanism": "central", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
    with (
        opened(job(tmp_path, privacy=plan, cohort={"quorum": 1})) as subject,
        pytest.raises(HansaError, match=r"norm is 5"),
    ):
        canaries.play(subject, 34, np.random.default_rng(0), Silent())


def test_few_canaries_are_refused(tmp_path: Path) -> None:
    plan = {"mechanism": "dp-sgd", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
    with opened(job(tmp_path, privacy=plan)) as subject:
        skipped = canaries.attack(subject, np.random.default_rng(0), Silent())
    assert "fewer than 32 prove nothing" in skipped.because


def test_directions_are_orthonormal_over_all_tensors() -> None:
    layout = {"a": trees.Spec("float32", (7, 3)), "b": trees.Spec("float32", ()), "c": trees.Spec("float32", (50,))}
    directions = canaries.Directions.drawn(layout, 40, np.random.default_rng(0))
    assert directions.size == 72
    found = np.zeros((40, 40))
    for number in range(40):
        tree = {name: np.zeros(spec.shape) for name, spec in layout.items()} | directions.pushed(number, 2.0)
        assert np.isclose(trees.norm(tree), 2.0)
        found[number] = directions.along(tree)
    assert np.allclose(found, 2 * np.eye(40))
