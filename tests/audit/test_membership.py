# SPDX-License-Identifier: Apache-2.0
"""LiRA tells members of an overfitted model, not those of a private one, and has no bias of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

import audited
from hansa.audit import membership
from hansa.audit.finding import Finding
from hansa.audit.membership import Shadows
from hansa.audit.subject import Subject, opened
from hansa.errors import SiteError
from hansa.runs.progress import Silent
from hansa.sinks import plots

TRAIN = {"optimizer": "sgd", "lr": 0.5, "steps": 40, "batch_size": 16}
PRIVATE = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-4}


def generator() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, Shadows, Finding]]:
    """48 shadows of a site of 64 digits, some with a wrong label, that a perceptron learns by heart."""
    with opened(audited.job(tmp_path_factory.mktemp("lira"), rows=80, wrong=0.15, rounds=4, train=TRAIN)) as subject:
        found = membership.shadows(subject, "s0", 48, generator(), Silent())
        yield subject, found, membership.judged(subject, found, generator())


def test_members_of_an_overfitted_model_are_told(overfitted: tuple[Subject, Shadows, Finding]) -> None:
    _, found, finding = overfitted
    area, rate, least = finding.measures
    assert area.value > 0.6
    assert 0.6 < area.low < area.value < area.high
    assert rate.low > 0.03
    assert least.value > 1
    assert finding.verdict == "leaks"
    assert found.epsilon is None
    picture = finding.pictures[0]
    drawn = plots.svg("p", picture.title, picture.draw, picture.height)
    assert ">0.1<" in drawn
    assert "mathdefault" not in drawn, "numbers are numbers, not TeX"


def test_coins_that_were_not_thrown_are_not_guessed(overfitted: tuple[Subject, Shadows, Finding]) -> None:
    subject, found, _ = overfitted
    others = replace(found, inside=np.random.default_rng(5).random(found.inside.shape) < 0.5)
    area, rate, least = membership.judged(subject, others, generator()).measures
    assert area.low < 0.5 < area.high
    assert rate.value < 0.03
    assert least.value < 0.2


def test_a_promise_that_is_not_kept_fails(overfitted: tuple[Subject, Shadows, Finding]) -> None:
    subject, found, _ = overfitted
    finding = membership.judged(subject, replace(found, epsilon=0.5, delta=1e-5), generator())
    assert finding.verdict == "fails"
    assert finding.measures[2].is_broken
    assert "the promise is broken" in finding.says


def test_members_of_a_private_model_are_not(tmp_path: Path) -> None:
    """Those of the same model without its noise are, by the same measures: so the test can tell."""
    train = {**TRAIN, "steps": 20, "batch_size": 32}

    def judged(**values: Any) -> tuple[Finding, float | None]:
        with opened(audited.job(tmp_path, rows=80, wrong=0.15, rounds=2, train=train, **values)) as subject:
            found = membership.shadows(subject, "s0", 16, generator(), Silent())
            return membership.judged(subject, found, generator()), subject.promised("the public")

    finding, promised = judged(privacy=PRIVATE)
    area, rate, least = finding.measures
    assert area.value < 0.68, "noise is drawn anew each time: 0.56 in the mean, and a deviation of 0.02"
    assert rate.value < 0.12
    assert finding.verdict == "holds"
    assert promised is not None
    assert promised <= least.bound < 2 * promised, "the ε of the model with the fewest examples"
    assert not least.is_broken
    area, rate, _ = judged()[0].measures
    assert area.value > 0.68
    assert rate.value > 0.12


def test_all_at_once_is_one_after_another(tmp_path: Path) -> None:
    with opened(audited.job(tmp_path, rows=20, train={**TRAIN, "steps": 6, "batch_size": 4})) as subject:
        chosen = [np.array([0, 3, 4, 9]), np.arange(5, 16), np.arange(16)]
        shadowed = membership._shadowed(subject, "s0", 16, 8)
        assert membership._is_one_computation(shadowed)
        assert shadowed.job.train.batch_size == 2, "as many rows of half the data"
        together = membership._at_once(shadowed, "s0", chosen)
        for rows, params in zip(chosen, together, strict=True):
            apart = membership._trained(shadowed, "s0", rows)
            moved = max(float(np.abs(apart[n] - subject.params[n]).max()) for n in apart)
            assert moved > 0.01
            # Batches are drawn by a site's name, which differs; so a batch of everybody is compared below.
            assert apart.keys() == params.keys()
    with opened(audited.job(tmp_path, rows=20, train={**TRAIN, "steps": 6, "batch_size": 32})) as subject:
        shadowed = membership._shadowed(subject, "s0", 16, 16)
        for rows, params in zip(chosen, membership._at_once(shadowed, "s0", chosen), strict=True):
            apart = membership._trained(shadowed, "s0", rows)
            assert max(float(np.abs(apart[n] - params[n]).max()) for n in apart) < 1e-5


@pytest.mark.parametrize(
    ("section", "alone"),
    [({}, True), ({"secure_aggregation": {"minimum": 3}}, False), ({"cohort": {"sample": 3}}, False)],
)
def test_who_takes_part_in_a_shadow(tmp_path: Path, section: dict[str, Any], alone: bool) -> None:
    with opened(audited.job(tmp_path, rows=20, train={**TRAIN, "steps": 2}, **section)) as subject:
        assert membership.is_alone(subject) == alone
        if alone:
            return
        assert not membership._is_one_computation(subject)
        moved = [membership._trained(subject, "s0", rows) for rows in (np.arange(4), np.arange(4, 12))]
    assert not np.array_equal(moved[0]["0.weight"], moved[1]["0.weight"]), "whose examples are left out matters"


def test_a_shadow_that_could_not_be_trained_is_told_of(tmp_path: Path) -> None:
    with (
        opened(audited.job(tmp_path, rows=20, train={**TRAIN, "lr": 1e30})) as subject,
        pytest.raises(SiteError, match="could not be trained"),
    ):
        membership.shadows(subject, "s0", 2, generator(), Silent())


def test_scores_are_the_papers_likelihood_ratio() -> None:
    drawn = np.random.default_rng(0)
    inside = drawn.random((10, 6)) < 0.5
    phi = drawn.normal(size=inside.shape) + inside
    scores = Shadows("s", inside, phi, None, 0.0).scores()
    mean = {
        (kind, t, i): phi[[s for s in range(10) if s != t and inside[s, i] == kind], i].mean()
        for kind in (True, False)
        for t in range(10)
        for i in range(6)
    }
    spread = {}
    for kind in (True, False):
        centred = [phi[inside[:, i] == kind, i] - phi[inside[:, i] == kind, i].mean() for i in range(6)]
        spread[kind] = np.sqrt(sum((c**2).sum() for c in centred) / sum(len(c) - 1 for c in centred))

    def likelihood(kind: bool, t: int, i: int) -> float:
        return float(-0.5 * ((phi[t, i] - mean[kind, t, i]) / spread[kind]) ** 2 - np.log(spread[kind]))

    for t in range(10):
        for i in range(6):
            assert scores[t, i] == pytest.approx(likelihood(True, t, i) - likelihood(False, t, i))


def test_a_target_s_own_coin_is_not_in_its_scores() -> None:
    drawn = np.random.default_rng(0)
    inside, phi = drawn.random((40, 50)) < 0.5, drawn.normal(size=(40, 50))
    areas = [membership.auc(Shadows("s", inside, phi, None, 0.0).scores()[t], inside[t]) for t in range(len(inside))]
    assert abs(np.mean(areas) - 0.5) < 4 * np.std(areas) / np.sqrt(len(areas)), "noise has no members"


def test_rates_and_area_are_the_usual_ones() -> None:
    drawn = np.random.default_rng(1)
    inside = drawn.random(300) < 0.4
    scores = np.round(drawn.normal(size=300) + inside, 1)  # with ties
    assert membership.auc(scores, inside) == pytest.approx(roc_auc_score(inside, scores))
    wrong, right, _ = roc_curve(inside, scores, drop_intermediate=False)
    mine = membership.roc(scores, inside)
    assert np.allclose(mine[0], wrong)
    assert np.allclose(mine[1], right)
    assert membership.rate_at(scores, inside, 0.1) == right[wrong <= 0.1].max()


def test_confidence_is_the_log_odds_of_the_label(tmp_path: Path) -> None:
    with opened(audited.job(tmp_path, rows=20)) as subject:
        phi = membership._confidence(subject.program, subject.params, "s0", np.arange(5))
        losses = subject.program.losses(subject.params, "s0", np.arange(5))
    p = np.exp(-losses)
    assert np.allclose(phi, np.log(p / (1 - p)))
