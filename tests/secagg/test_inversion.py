# SPDX-License-Identifier: Apache-2.0
"""Gradient inversion reads a site's example off its plain update, and no more than chance off its masked one.

The attack is the analytic one on a fully connected layer with a bias (Geiping et al. 2020, arXiv:2003.14053, §3): of
one example x, ∇W = δ xᵀ and ∇b = δ, so x = ∇W_j / ∇b_j for any j with δ_j ≠ 0. Here j is the best of all rows by its
cosine to the truth, which no real attacker knows: still no better than chance.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from hansa.secagg.ring import Range, encoding
from sums import Federation, terms_for
from sums import masked as masked_by

CLASSES, INPUTS, TRIALS = 10, 64, 40
RING = encoding({"delta": {"b": Range(-4, 4, shape=(CLASSES,)), "w": Range(-16, 16, shape=(CLASSES, INPUTS))}}, sites=4)


def gradient(example: np.ndarray, label: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradient of the cross-entropy of a linear softmax model at one example."""
    logits = weights @ example
    delta = np.exp(logits - logits.max())
    delta /= delta.sum()
    delta[label] -= 1
    return {"w": np.outer(delta, example), "b": delta}


def attacked(update: dict[str, np.ndarray], example: np.ndarray) -> float:
    """Return the best cosine of any row's reconstruction to the example."""
    bias = np.where(update["b"] == 0, 1e-12, update["b"])
    guesses = update["w"] / bias[:, None]
    return max(abs(guess @ example) / (np.linalg.norm(guess) * np.linalg.norm(example)) for guess in guesses)


def decoded(vector: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a server reads in one masked vector, taken for a plain one."""
    signed, found, start = vector.view(f"int{RING.bits}"), {}, 0
    for field in RING.fields:
        found[field.name] = np.ldexp(signed[start : start + field.size].astype(float), -field.exponent)
        found[field.name] = found[field.name].reshape(field.shape)
        start += field.size
    return found


def test_masks_stop_gradient_inversion():
    generator = np.random.default_rng(3)
    plain, masked, chance = [], [], []
    for trial in range(TRIALS):
        examples = generator.normal(size=(4, INPUTS))
        weights = generator.normal(size=(CLASSES, INPUTS)) / 8
        federation = Federation(terms_for(4, RING, round=trial + 1))
        updates = {name: gradient(examples[place], place, weights) for place, name in enumerate(federation.terms.sites)}
        federation.share(federation.terms.sites, federation.advertise(federation.terms.sites))
        for place, (name, update) in enumerate(updates.items()):
            federation.site(name).receive(federation.server.inbox(name))
            vector = masked_by(federation.site(name), {"delta": update})
            noise = generator.integers(0, 2**RING.bits, RING.size, dtype=RING.dtype)
            plain.append(attacked(update, examples[place]))
            masked.append(attacked(decoded(vector), examples[place]))
            chance.append(attacked(decoded(noise), examples[place]))
    assert min(plain) > 1 - 1e-9
    assert stats.ks_2samp(masked, chance).pvalue > 1e-7
    assert np.mean(masked) < np.mean(chance) + 9 * np.std(chance) / np.sqrt(len(chance))
    assert stats.ks_2samp(plain, chance).pvalue < 1e-9, "the test can tell"
