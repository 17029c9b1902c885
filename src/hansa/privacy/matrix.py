# SPDX-License-Identifier: Apache-2.0
"""Noise that is correlated over rounds, for runs without sampling: DP-FTRL by banded matrix factorisation.

What counts is the noise of a *running* model, the sum of all rounds' steps. Noise that is drawn anew in each round adds
up there; correlated noise takes back later most of what it has added. With A the matrix of ones on and below the
diagonal, A = B C, the server adds C⁻¹ Z to the rounds' sums, Z being independent normal draws: who sees every round
learns no more than from C X + Z, which is one Gaussian release, of noise ``noise_multiplier`` × clip × sensitivity of C
(Denisov et al. 2022, arXiv:2202.08312: also where later updates depend on earlier releases).

C is lower triangular and Toeplitz, and has the first ``bands`` coefficients of A's square root, binom(2k, k) / 4ᵏ
(Kalinin and Lampert 2024, arXiv:2405.13763). They are positive and fall, so that unit has most influence which takes
part in the first round, and then as early and as often as it may. Where its rounds are at least ``bands`` apart, its
columns of C do not overlap (Choquette-Choo et al. 2023, arXiv:2306.08153), and k participations cost √k.

Nothing secret is stored from round to round: the noise of round t, counted from 0, is Σ_k d_k z_{t-k}, d being the
coefficients of C⁻¹, and each z_r is drawn again from the run's secret. It costs t + 1 draws an element, and the memory
of a few blocks.

| case | result |
|---|---|
| more participations than rounds and separation allow | as many as they allow |
| everybody in every round | no correlation helps: one band, which is independent noise |
| a round beyond those that the factorisation is made for | PrivacyError: nobody has accounted for it |
| a unit that takes part more often, or sooner again, than was said | not seen here: who draws cohorts must not ask it |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hansa.core.lazy import Array, Leaf, Memo
from hansa.errors import PrivacyError
from hansa.privacy.draws import Secret

Coefficients = NDArray[np.float64]

_CHOICES = 200


@dataclass(frozen=True)
class Factorisation:
    """C for a run, and what it costs.

    Attributes:
        rounds: how many rounds it is for.
        bands: how many coefficients of C are not zero.
        sensitivity: the L2 norm of C X, all rounds of one unit whose updates have norm 1.
    """

    rounds: int
    bands: int
    sensitivity: float

    def noise(
        self,
        secret: Secret,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic],
        std: float,
        round: int,
        *labels: int | str,
    ) -> Leaf:
        """Return the noise of one round's sum, made a block at a time where it is read.

        Args:
            secret: the run's.
            shape: of the tensor.
            dtype: of the noise; it is added up in float64.
            std: of the independent draws: noise multiplier × clip × ``sensitivity``.
            round: counted from 0.
            labels: which tensor.

        Raises:
            PrivacyError: the factorisation has no such round.
        """
        if not 0 <= round < self.rounds:
            raise PrivacyError(
                f"The correlated noise is made for {self.rounds} rounds, and round {round + 1} is asked for. More "
                "rounds are another plan, with another noise: begin a new run."
            )
        weights = inverse(coefficients(self.bands, self.rounds))[: round + 1]
        wide = np.dtype(np.float64)
        draws = [secret.gaussian(shape, wide, std, *labels, round - back) for back in range(round + 1)]

        def read(start: int, stop: int, memo: Memo) -> Array:
            total = np.zeros(stop - start)
            for weight, drawn in zip(weights, draws, strict=True):
                total += weight * drawn[start:stop]
            return total.astype(dtype)

        return Leaf(shape, np.dtype(dtype), read)


@lru_cache(maxsize=16)
def factorised(rounds: int, participations: int | None = None, separation: int = 1) -> Factorisation:
    """Return the factorisation whose running models have the least noise, over all rounds.

    Args:
        rounds: how many there are.
        participations: how often one unit takes part at most; as often as the separation allows if left out.
        separation: the least number of rounds from one participation of a unit to its next.

    >>> factorised(100, participations=10, separation=10)
    Factorisation(rounds=100, bands=10, sensitivity=4.232427130602596)
    """
    most = participations or rounds
    choices = {int(bands) for bands in np.geomspace(1, rounds, _CHOICES).round()} | {min(separation, rounds)}

    def total(bands: int) -> float:
        return math.hypot(*errors(coefficients(bands, rounds), most, separation))

    bands = min(sorted(choices), key=total)
    return Factorisation(rounds, bands, sensitivity(coefficients(bands, rounds), most, separation))


def coefficients(bands: int, rounds: int) -> Coefficients:
    """Return the first column of C: the first ``bands`` coefficients of 1/√(1 - x), then zeros.

    >>> coefficients(3, 5)
    array([1.   , 0.5  , 0.375, 0.   , 0.   ])
    """
    k = np.arange(1, rounds)
    column = np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])
    column[bands:] = 0.0
    return column


def inverse(column: Coefficients) -> Coefficients:
    """Return the first column of C⁻¹.

    >>> inverse(coefficients(3, 3))
    array([ 1.   , -0.5  , -0.125])
    """
    band = np.trim_zeros(column, "b")[:0:-1]
    padded = np.zeros(band.size + column.size)
    padded[band.size] = 1.0
    for row in range(1, column.size):
        padded[band.size + row] = -band @ padded[row : band.size + row]
    return padded[band.size :]


def sensitivity(column: Coefficients, participations: int, separation: int) -> float:
    """Return how far one unit can move C X in L2 norm, with updates of norm at most 1.

    Exact for coefficients that are not negative and do not rise.
    """
    assert column.min() >= 0, "coefficients are not negative"
    assert np.diff(column).max(initial=0.0) <= 0, "coefficients do not rise"
    moved = np.zeros_like(column)
    for start in range(0, column.size, separation)[:participations]:
        moved[start:] += column[: column.size - start]
    return float(np.linalg.norm(moved))


def errors(column: Coefficients, participations: int, separation: int) -> Coefficients:
    """Return the standard deviation of each round's running model, for a noise multiplier and a clip of 1."""
    running = np.cumsum(inverse(column))
    return sensitivity(column, participations, separation) * np.sqrt(np.cumsum(running**2))
