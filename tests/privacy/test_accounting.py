# SPDX-License-Identifier: Apache-2.0
"""ε against published and golden values, against each other, and at the edges of the module's table."""

import math

import pytest
from scipy.stats import norm

from hansa.errors import PrivacyError
from hansa.privacy.accounting import LARGEST, Release, epsilon, epsilon_of_zcdp, noise_for

GOLDEN = [
    (256 / 60_000, 1.1, 14_062, 2.597, 2.382),
    (0.01, 1.0, 1_000, 2.101, 1.828),
    (0.01, 1.0, 10_000, 6.713, 6.188),
    (0.1, 4.0, 500, 2.549, 2.341),
    (1.0, 20.0, 100, 2.166, 1.993),
]
"""Rate, noise multiplier, releases, and ε at δ = 1e-5 by RDP and by PLD."""

PUBLISHED = [(0.15, 3.416, 3.42, 3.574, 3.867), (0.0144, 0.996, 0.994, 1.045, 1.166)]
"""ρ of Gboard's models in es-ES and pt-BR; ε at δ = 1e-10: exact, as published, by CKS 2020, and by the naive bound."""


def exact_delta(noise: float, eps: float) -> float:
    """Return the δ of one Gaussian release (Balle and Wang 2018, Theorem 8)."""
    half = 1 / (2 * noise)
    return float(norm.cdf(half - eps * noise) - math.exp(eps) * norm.cdf(-half - eps * noise))


@pytest.mark.parametrize(("rate", "noise", "count", "rdp", "pld"), GOLDEN)
def test_golden_values_of_sampled_releases(rate: float, noise: float, count: int, rdp: float, pld: float) -> None:
    release = [Release(noise, rate, count)]
    assert epsilon(release, 1e-5, "rdp") == pytest.approx(rdp, abs=1e-3)
    assert epsilon(release, 1e-5, "pld") == pytest.approx(pld, abs=1e-3)


@pytest.mark.parametrize(("rho", "exact", "published", "cks", "naive"), PUBLISHED)
def test_three_ways_from_rho_to_epsilon(rho: float, exact: float, published: float, cks: float, naive: float) -> None:
    noise = math.sqrt(1 / (2 * rho))
    by_pld = epsilon([Release(noise)], 1e-10, "pld")
    assert by_pld == pytest.approx(exact, abs=1e-3)
    assert by_pld == pytest.approx(published, abs=5e-3)
    assert exact_delta(noise, by_pld) == pytest.approx(1e-10, rel=1e-3)
    assert epsilon([Release(noise)], 1e-10, "zcdp") == pytest.approx(cks, abs=1e-3)
    assert epsilon([Release(noise)], 1e-10, "rdp") == pytest.approx(cks, abs=2e-3)
    wrong = rho + 2 * math.sqrt(rho * math.log(1e10))
    assert wrong == pytest.approx(naive, abs=1e-3)
    assert by_pld < epsilon_of_zcdp(rho, 1e-10) < 0.95 * wrong


def test_many_releases_are_one_of_less_noise() -> None:
    for accountant in ("pld", "rdp", "zcdp"):
        many = epsilon([Release(10.0, count=70), Release(10.0, count=30)], 1e-6, accountant)
        assert many == pytest.approx(epsilon([Release(1.0)], 1e-6, accountant), rel=1e-6)
        other = epsilon([Release(3.0, count=2), Release(6.0, count=4)], 1e-6, accountant)
        assert other == pytest.approx(epsilon([Release(math.sqrt(3))], 1e-6, accountant), rel=1e-6)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "zcdp"])
def test_epsilon_falls_with_noise_and_delta_and_rises_with_releases(accountant: str) -> None:
    def of(noise: float = 2.0, rate: float = 0.05, count: int = 100, delta: float = 1e-5) -> float:
        return epsilon([Release(noise, rate, count)], delta, accountant)  # type: ignore[arg-type]

    assert of(noise=1.0) > of() > of(noise=4.0)
    assert of(count=200) > of() > of(count=50)
    assert of(delta=1e-6) > of() > of(delta=1e-4)
    if accountant != "zcdp":
        assert of(rate=0.1) > of() > of(rate=0.01)


def test_pld_is_the_smallest_and_zcdp_uses_no_sampling() -> None:
    release = Release(1.5, 0.02, 200)
    pld, rdp, zcdp = (epsilon([release], 1e-5, accountant) for accountant in ("pld", "rdp", "zcdp"))
    assert pld < rdp < zcdp
    assert zcdp == epsilon([Release(1.5, 1.0, 200)], 1e-5, "zcdp")


def test_sampled_and_whole_releases_compose() -> None:
    sampled, whole = Release(1.0, 0.01, 500), Release(8.0, count=20)
    for accountant in ("pld", "rdp"):
        both = epsilon([sampled, whole], 1e-5, accountant)
        apart = epsilon([sampled], 1e-5, accountant), epsilon([whole], 1e-5, accountant)
        assert max(apart) < both < sum(epsilon([r], 5e-6, accountant) for r in (sampled, whole))


@pytest.mark.parametrize("accountant", ["pld", "rdp", "zcdp"])
def test_the_edges(accountant: str) -> None:
    def of(*releases: Release) -> float:
        return epsilon(releases, 1e-5, accountant)  # type: ignore[arg-type]

    assert of() == 0
    assert of(Release(0.0, count=0), Release(1.0, rate=0.0)) == 0
    assert of(Release(0.0)) == math.inf == of(Release(1.0), Release(0.0, rate=0.01))
    assert of(Release(1e5)) < 1e-3


def test_tiny_noise_is_a_large_finite_epsilon() -> None:
    sampled = epsilon([Release(0.1, 0.1, 10)], 1e-5, "pld")
    assert sampled == pytest.approx(329.23, abs=0.01)
    assert sampled < epsilon([Release(0.1, 0.1, 10)], 1e-5, "rdp")
    assert epsilon([Release(0.01)], 1e-5, "pld") == pytest.approx(5425.51, abs=0.01)


@pytest.mark.parametrize("noise", [1e3, 2e4, 1e5])
def test_much_noise_is_a_small_epsilon_without_a_warning(noise: float) -> None:
    spent = epsilon([Release(noise)], 1e-12)
    assert 0 < spent < 10 / noise
    assert exact_delta(noise, spent) == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "rate", "count", "accountant"),
    [
        (2.0, 0.05, 200, "pld"),
        (2.0, 0.05, 200, "rdp"),
        (2.0, 0.05, 200, "zcdp"),
        (8.0, 1.0, 1, "pld"),
        (0.1, 1.0, 50, "pld"),
        (500.0, 1.0, 1, "pld"),
    ],
)
def test_the_noise_found_meets_the_epsilon_and_less_does_not(
    target: float, rate: float, count: int, accountant: str
) -> None:
    noise = noise_for(target, 1e-5, rate, count, accountant)  # type: ignore[arg-type]
    assert 0.99 * target < epsilon([Release(noise, rate, count)], 1e-5, accountant) <= target  # type: ignore[arg-type]
    assert epsilon([Release(0.98 * noise, rate, count)], 1e-5, accountant) > target  # type: ignore[arg-type]


def test_an_epsilon_that_no_noise_gives() -> None:
    with pytest.raises(PrivacyError, match="No noise multiplier up to 100000 gives"):
        noise_for(1e-6, 1e-12, 1.0, 10_000)
    assert epsilon([Release(LARGEST, count=10_000)], 1e-12) > 1e-6
