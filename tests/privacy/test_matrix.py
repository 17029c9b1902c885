# SPDX-License-Identifier: Apache-2.0
"""Correlated noise against dense matrices, every pattern of participation, and statistics."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import sqrtm, toeplitz

from hansa.core.lazy import BLOCK
from hansa.errors import PrivacyError
from hansa.privacy.draws import KEY_BYTES, Secret
from hansa.privacy.matrix import coefficients, errors, factorised, inverse, sensitivity

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def dense(column: Matrix) -> Matrix:
    return np.asarray(toeplitz(column, np.zeros_like(column)))


def sums(rounds: int) -> Matrix:
    return np.tril(np.ones((rounds, rounds)))


def patterns(rounds: int, participations: int, separation: int) -> list[tuple[int, ...]]:
    """Return every set of rounds in which a unit may take part."""
    return [
        chosen
        for size in range(1, participations + 1)
        for chosen in itertools.combinations(range(rounds), size)
        if all(b - a >= separation for a, b in itertools.pairwise(chosen))
    ]


def by_brute_force(matrix: Matrix, participations: int, separation: int) -> float:
    """Return the largest movement over all patterns, of updates in whatever directions are worst."""
    gram = np.abs(matrix.T @ matrix)
    return max(math.sqrt(gram[np.ix_(p, p)].sum()) for p in patterns(len(matrix.T), participations, separation))


def tree(rounds: int) -> Matrix:
    """Return the sums that tree aggregation releases (Kairouz et al. 2021); rounds are a power of 2."""
    rows = []
    size = 1
    while size <= rounds:
        rows += [np.repeat(np.eye(rounds // size)[i], size) for i in range(rounds // size)]
        size *= 2
    return np.array(rows)


def test_without_a_band_c_is_the_square_root_of_the_prefix_sums() -> None:
    np.testing.assert_allclose(dense(coefficients(12, 12)), sqrtm(sums(12)).real, atol=1e-6)


@pytest.mark.parametrize("bands", [1, 2, 5, 40])
def test_the_inverse(bands: int) -> None:
    column = coefficients(bands, 40)
    assert np.count_nonzero(column) == bands
    np.testing.assert_allclose(dense(column) @ dense(inverse(column)), np.eye(40), atol=1e-12)


@pytest.mark.parametrize(("participations", "separation"), [(1, 1), (2, 1), (3, 2), (3, 3), (2, 7), (9, 1), (4, 3)])
@pytest.mark.parametrize("bands", [1, 2, 3, 5, 9])
def test_sensitivity_over_all_patterns(bands: int, participations: int, separation: int) -> None:
    column = coefficients(bands, 9)
    worst = by_brute_force(dense(column), participations, separation)
    assert sensitivity(column, participations, separation) == pytest.approx(worst, rel=1e-12)


def test_rounds_apart_by_the_bands_cost_the_root_of_their_number() -> None:
    column = coefficients(5, 40)
    assert sensitivity(column, 8, 5) == pytest.approx(math.sqrt(8) * np.linalg.norm(column))
    assert sensitivity(column, 8, 4) > sensitivity(column, 8, 5)


@pytest.mark.parametrize("wrong", [[1.0, -0.5, 0.0], [1.0, 0.0, 0.5]])
def test_sensitivity_is_not_claimed_for_other_coefficients(wrong: list[float]) -> None:
    with pytest.raises(AssertionError):
        sensitivity(np.array(wrong), 1, 1)


@pytest.mark.parametrize(("participations", "separation"), [(1, 1), (4, 8), (32, 1)])
@pytest.mark.parametrize("bands", [1, 4, 32])
def test_the_error_of_running_models(bands: int, participations: int, separation: int) -> None:
    column = coefficients(bands, 32)
    each = np.linalg.norm(sums(32) @ np.linalg.inv(dense(column)), axis=1)
    expected = sensitivity(column, participations, separation) * each
    np.testing.assert_allclose(errors(column, participations, separation), expected, rtol=1e-12)


GOLDEN = [
    (32, 1, 32, 22, 1.9893, 4.0620),
    (64, 1, 64, 44, 2.2054, 5.7009),
    (100, 5, 20, 20, 5.7931, 15.8902),
    (100, 10, 10, 10, 9.6110, 22.4722),
    (1000, 10, 100, 100, 12.1032, 70.7460),
]
"""Rounds, participations, separation; the best bands, their root mean square error, and independent noise's."""


@pytest.mark.parametrize(("rounds", "participations", "separation", "bands", "error", "independent"), GOLDEN)
def test_golden_errors(
    rounds: int, participations: int, separation: int, bands: int, error: float, independent: float
) -> None:
    def rms(bands: int) -> float:
        return float(np.sqrt(np.mean(errors(coefficients(bands, rounds), participations, separation) ** 2)))

    made = factorised(rounds, participations, separation)
    assert made.bands == bands
    assert rms(made.bands) == pytest.approx(error, abs=1e-4)
    assert rms(1) == pytest.approx(independent, abs=1e-4)
    assert rms(1) == pytest.approx(math.sqrt(participations * (rounds + 1) / 2))


def test_the_bands_chosen_are_the_best_or_close() -> None:
    for rounds, participations, separation in [(90, 1, 90), (90, 9, 10), (90, 20, 3), (400, 40, 10)]:

        def total(bands: int, rounds: int = rounds, k: int = participations, apart: int = separation) -> float:
            return float(np.linalg.norm(errors(coefficients(bands, rounds), k, apart)))

        best = min(map(total, range(1, rounds + 1)))
        assert total(factorised(rounds, participations, separation).bands) <= 1.001 * best


@pytest.mark.parametrize(("rounds", "participations", "separation"), [(32, 1, 32), (64, 1, 64), (64, 4, 16)])
def test_less_noise_than_a_tree_at_its_best(rounds: int, participations: int, separation: int) -> None:
    c = tree(rounds)
    b = sums(rounds) @ np.linalg.pinv(c)  # all nodes used, as if the future were known: better than any online tree
    allowed = patterns(rounds, 1, 1) if participations == 1 else [tuple(range(0, rounds, separation))]
    tree_error = max(np.linalg.norm(c[:, p].sum(axis=1)) for p in allowed) * np.linalg.norm(b)
    made = factorised(rounds, participations, separation)
    banded = np.linalg.norm(errors(coefficients(made.bands, rounds), participations, separation))
    assert banded < 0.9 * tree_error


def test_everybody_in_every_round_gets_independent_noise() -> None:
    made = factorised(20)
    assert (made.bands, made.sensitivity) == (1, pytest.approx(math.sqrt(20)))
    assert factorised(20, participations=500) == made
    assert factorised(1).bands == 1


def test_the_noise_of_running_models_has_the_covariance_of_the_closed_form() -> None:
    rounds, size, std = 6, 200_000, 0.7
    made = factorised(rounds, 2, 3)
    assert made.bands > 1
    secret = Secret(bytes(KEY_BYTES))
    noise = [np.asarray(made.noise(secret, (size,), np.dtype(np.float64), std, r, "w")) for r in range(rounds)]
    running = np.cumsum(noise, axis=0)
    b = sums(rounds) @ np.linalg.inv(dense(coefficients(made.bands, rounds)))
    np.testing.assert_allclose(running @ running.T / size, std**2 * b @ b.T, atol=0.02)
    independent = std**2 * sums(rounds) @ sums(rounds).T
    assert np.abs(running @ running.T / size - independent).max() > 0.5
    z = dense(coefficients(made.bands, rounds)) @ np.array(noise)
    np.testing.assert_allclose(z @ z.T / size, std**2 * np.eye(rounds), atol=0.02)


def test_a_round_made_again_and_any_slice_of_it_are_the_same() -> None:
    made = factorised(50, 5, 10)
    shape = (3, BLOCK // 2)
    first, again = (
        made.noise(Secret(bytes(KEY_BYTES)), shape, np.dtype(np.float32), 2.0, 7, "delta", "w") for _ in range(2)
    )
    whole = np.asarray(first)
    assert (whole.shape, whole.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(whole, np.asarray(again))
    np.testing.assert_array_equal(whole.ravel()[BLOCK - 3 : BLOCK + 9], again[BLOCK - 3 : BLOCK + 9])


@pytest.mark.parametrize("round", [-1, 5])
def test_a_round_that_is_not_accounted_for_is_refused(round: int) -> None:
    with pytest.raises(PrivacyError, match="made for 5 rounds"):
        factorised(5).noise(Secret.fresh(), (3,), np.dtype(np.float32), 1.0, round)
