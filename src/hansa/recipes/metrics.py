# SPDX-License-Identifier: Apache-2.0
"""Classification metrics as sums that add up over batches and sites, and back from sums to metrics.

    precision = tp / (tp + fp)    recall = tp / (tp + fn)    F1 = 2 tp / (2 tp + fp + fn)

Macro-F1 is the mean over the labels that occur, as truth or as prediction. An F1 without any truth or prediction
is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Span = tuple[str, int, int]


def confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_labels: int) -> dict[str, float]:
    """Return ``count``, ``correct``, and for every label i ``tp_i``, ``fp_i`` and ``fn_i``.

    Args:
        truth: (n,) label indices.
        predicted: (n,) label indices.
        num_labels: how many labels there are.
    """
    hits = np.bincount(truth[truth == predicted], minlength=num_labels)
    wrong = np.bincount(predicted, minlength=num_labels) - hits
    missed = np.bincount(truth, minlength=num_labels) - hits
    sums = {"count": float(len(truth)), "correct": float(hits.sum())}
    for i in range(num_labels):
        sums |= {f"tp_{i}": float(hits[i]), f"fp_{i}": float(wrong[i]), f"fn_{i}": float(missed[i])}
    return sums


def macro_f1(sums: Mapping[str, float]) -> float:
    """Return macro-F1 from the sums of :func:`confusion`."""
    scores = []
    for name, hits in sums.items():
        if not name.startswith("tp_"):
            continue
        label = name.removeprefix("tp_")
        total = 2 * hits + sums[f"fp_{label}"] + sums[f"fn_{label}"]
        if total:
            scores.append(2 * hits / total)
    return sum(scores) / len(scores) if scores else 0.0


def f1(hits: float, predicted: float, truth: float) -> tuple[float, float, float]:
    """Return precision, recall and F1 from counts of hits, predictions and truths.

    >>> f1(1, 2, 4)
    (0.5, 0.25, 0.3333333333333333)
    """
    precision = hits / predicted if predicted else 0.0
    recall = hits / truth if truth else 0.0
    return precision, recall, 2 * hits / (predicted + truth) if predicted + truth else 0.0


def spans(tags: Sequence[str]) -> set[Span]:
    """Return the entities (type, first word, word after the last) of IOB2 tags, strictly: B- begins each one.

    >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]))
    [('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[Span] = set()
    kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and not (mark == "I" and name == kind):
            found.add((kind, start, i))
            kind = ""
        if mark == "B":
            kind, start = name, i
    return found
