# SPDX-License-Identifier: Apache-2.0
"""Metrics from sums against scikit-learn and seqeval, over data sets cut into sites at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn

from hansa.recipes import metrics
from hansa.recipes.batching import IGNORED
from hansa.recipes.token_classification import TokenClassification

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


@given(PAIRS, st.integers(0, 60))
def test_macro_f1_of_summed_sites_is_scikit_learn_s_of_all_rows(pairs: list[tuple[int, int]], cut: int) -> None:
    both = np.array(pairs, np.int64)
    sums: dict[str, float] = {}
    for part in (both[:cut], both[cut:]):
        for name, value in metrics.confusion(part[:, 0], part[:, 1], 6).items():
            sums[name] = sums.get(name, 0.0) + value
    expected = sklearn.f1_score(both[:, 0], both[:, 1], average="macro", zero_division=0)
    assert metrics.macro_f1(sums) == pytest.approx(expected)
    assert sums["correct"] / sums["count"] == pytest.approx(sklearn.accuracy_score(both[:, 0], both[:, 1]))


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SENTENCE = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(st.lists(SENTENCE, min_size=1, max_size=6))
def test_entities_are_seqeval_s_strict_iob2(sentences: list[list[tuple[int, int]]]) -> None:
    truth = [[TAGS[t] for t, _ in sentence] for sentence in sentences]
    guess = [[TAGS[g] for _, g in sentence] for sentence in sentences]
    longest = max(map(len, sentences))
    tags = np.full((len(sentences), longest), IGNORED)
    predicted = np.zeros_like(tags)
    for row, sentence in enumerate(sentences):
        tags[row, : len(sentence)] = [t for t, _ in sentence]
        predicted[row, : len(sentence)] = [g for _, g in sentence]
    task = TokenClassification(TAGS, 8)
    found = task.summarise({"loss_sum": 0.0, "seen": 1.0, **task._counts(tags, predicted)})
    how = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    assert found["f1"] == pytest.approx(f1_score(truth, guess, **how))
    assert found["precision"] == pytest.approx(precision_score(truth, guess, **how))
    assert found["recall"] == pytest.approx(recall_score(truth, guess, **how))
    flat = [[tag for sentence in side for tag in sentence] for side in (truth, guess)]
    inside = sklearn.f1_score(*flat, labels=list(TAGS[1:]), average="micro", zero_division=0)
    assert found["token_f1"] == pytest.approx(inside)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(*flat))


def test_nothing_summed_gives_no_metric_and_nothing_found_gives_zero() -> None:
    task = TokenClassification(TAGS, 8)
    assert task.summarise({}) == {}
    assert metrics.f1(0, 0, 0) == (0.0, 0.0, 0.0)
    assert metrics.macro_f1({}) == 0.0
