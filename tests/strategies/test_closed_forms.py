# SPDX-License-Identifier: Apache-2.0
"""Where each algorithm ends on quadratics f_i = a_i/2 (w - b_i)^2, worked out by hand.

K gradient steps of size l take y to b + (1 - la)^K (w - b), so a round moves site i by s_i (b_i - w) with
s_i = 1 - (1 - l a_i)^K_i, and the mean over weights n_i stands still at  w* = sum n_i s_i b_i / sum n_i s_i.

FedProx adds mu (y - w) to the gradient: steps contract by 1 - l(a + mu) around (ab + mu w)/(a + mu), so a round moves
site i by t_i (b_i - w) with t_i = a_i/(a_i + mu) (1 - (1 - l(a_i + mu))^K_i), and likewise.
"""

import pytest

from hansa.strategies.fedavg import fedavg
from hansa.strategies.fedprox import fedprox
from hansa.strategies.scaffold import scaffold
from quadratics import LR, A, B, K, N, end

OPTIMUM = (N * A * B).sum() / (N * A).sum()
OPTIMUM_OVER_SITES = (A * B).sum() / A.sum()


def test_fedavg_ends_at_its_biased_fixed_point():
    s = 1 - (1 - LR * A) ** K
    assert end(fedavg()) == pytest.approx((N * s * B).sum() / (N * s).sum(), rel=1e-10)
    assert abs(end(fedavg()) - OPTIMUM) > 0.01, "the bias must be there to be found"


@pytest.mark.parametrize("mu", [0.0, 0.5, 5.0])
def test_fedprox_ends_at_its_fixed_point(mu):
    t = A / (A + mu) * (1 - (1 - LR * (A + mu)) ** K)
    assert end(fedprox(mu)) == pytest.approx((N * t * B).sum() / (N * t).sum(), rel=1e-10)


def test_a_strong_proximal_term_lessens_the_bias():
    assert abs(end(fedprox(5.0)) - OPTIMUM) < abs(end(fedavg()) - OPTIMUM) / 2


@pytest.mark.parametrize(("objective", "optimum"), [("examples", OPTIMUM), ("sites", OPTIMUM_OVER_SITES)])
def test_scaffold_ends_at_the_true_optimum_of_its_objective(objective, optimum):
    assert end(scaffold(objective=objective)) == pytest.approx(optimum, rel=1e-9)
    assert abs(OPTIMUM - OPTIMUM_OVER_SITES) > 0.01, "the two objectives must differ"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("objective", "optimum"), [("examples", OPTIMUM), ("sites", OPTIMUM_OVER_SITES)])
def test_scaffold_ends_there_whoever_is_asked(objective, optimum, seed):
    """The mean weight of those asked is not everybody's, and the control must not drift for that."""
    found = end(scaffold(objective=objective), rounds=600, sample=2, seed=seed)
    assert found == pytest.approx(optimum, rel=1e-9)
