# SPDX-License-Identifier: Apache-2.0
"""DP-SGD at a site: draws, clipped sums, steps, what leaves the site, what is refused, and the ε of what ran."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import stats
from torch import Tensor, nn

from hansa.client import torch as bridge
from hansa.client.clipped import PROBES, Clipper, clipped
from hansa.client.functional import Examples, Functional, FunctionalProgram, of_numpy, of_torch
from hansa.core.config import Job, PrivacySection, TrainSection, parse
from hansa.core.fit import Trait, check_fit
from hansa.core.ports import Correction
from hansa.core.tree import Tree
from hansa.core.values import Plan
from hansa.errors import FitError, JobError, MissingExtraError, ModelError, PrivacyError
from hansa.privacy.draws import KEY_BYTES, Secret
from hansa.privacy.plan import SLACK, Terms, plan_of
from hansa.privacy.steps import NoisySteps, noisy_steps
from hansa.runs.pieces import pieces_of
from hansa.strategies.fedprox import fedprox
from hansa.strategies.scaffold import scaffold
from hansa.workers.runner import Course

ALPHA = 1e-7
"""Draws are fresh, and this says how often one comparison fails by that; each rejects another rate or deviation too."""
APART = 6 / math.sqrt(4000)
"""The largest correlation of 4,000 pairs of draws that depend on nothing common: six of its deviations."""


def section(noise: float = 1.0, clip: float = 1.0, **more: Any) -> PrivacySection:
    """Return a section of dp-sgd; a noise of 0, which a job may not ask for, is for limits."""
    made = PrivacySection(mechanism="dp-sgd", clip=clip, noise_multiplier=noise or 1.0, delta=1e-4, **more)
    return made.model_copy(update={"noise_multiplier": noise})


def steps(
    examples: int, rate: float, count: int, noise: float = 1.0, clip: float = 1.0, secret: Secret | None = None
) -> NoisySteps:
    return NoisySteps(Terms(section(noise, clip), count, rate), examples, count, secret or Secret.fresh())


def job(recipe: str = "tabular-classification", **more: Any) -> Job:
    values = {"name": "hidden", "recipe": recipe, "baselines": {"local": False}, **more}
    values.setdefault("privacy", {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5})
    return parse(values)


def plan(params: Tree, round: int = 1) -> Plan:
    return Plan("hidden", round, "train", 0, params, seed=0)


def chi_square(observed: Any, expected: Any, fitted: int = 0) -> float:
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(observed) - 1 - fitted))


# --- draws


def test_each_example_is_drawn_by_itself_with_the_rate() -> None:
    n, q, count = 60, 0.2, 4000
    seen = np.zeros((count, n), bool)
    for step, rows in enumerate(steps(n, q, count).batches()):
        seen[step, rows] = True
        assert (np.diff(rows) > 0).all()
    assert unlike(seen, q) == set()


def unlike(seen: Any, q: float) -> set[str]:
    """Return in what ``seen`` (step, example) is unlike draws of each example by itself with probability q."""
    count, n = seen.shape
    times = seen.sum(0)
    each = float(((times - count * q) ** 2 / (count * q * (1 - q))).sum())
    sizes = seen.sum(1)
    bins = [stats.binom.cdf(7, n, q), *(stats.binom.pmf(k, n, q) for k in range(8, 17)), stats.binom.sf(16, n, q)]
    counts = [(sizes <= 7).sum(), *((sizes == k).sum() for k in range(8, 17)), (sizes >= 17).sum()]
    odds = np.array([q * q, q * (1 - q), (1 - q) * q, (1 - q) ** 2])

    def together(a: Any, b: Any) -> float:
        both = [((a == x) & (b == y)).sum() for x, y in itertools.product((True, False), repeat=2)]
        return chi_square(both, len(a) * odds)

    pairs = [together(seen[:, a], seen[:, b]) for a, b in itertools.combinations(range(6), 2)]
    return {
        what
        for what, chance in {
            "how often": stats.chi2.sf(each, n),
            "how evenly": stats.chi2.cdf(each, n),
            "batch sizes": chi_square(counts, count * np.array(bins)),
            "two examples": min(pairs) * len(pairs),
            "two steps": together(seen[:-1, 0], seen[1:, 0]),
        }.items()
        if chance < ALPHA
    }


def test_other_draws_are_told_from_independent_ones() -> None:
    """So the test above can fail: by each of what it looks at."""
    n, q, count = 60, 0.2, 4000
    drawn = np.random.default_rng(0)
    independent = drawn.random((count, n)) < q
    assert unlike(independent, q) == set()
    assert unlike(drawn.random((count, n)) < 0.22, q) >= {"how often", "batch sizes"}
    epochs = np.zeros((count, n), bool)
    for epoch in range(0, count, 5):
        epochs[np.repeat(np.arange(epoch, epoch + 5), 12), drawn.permutation(n)] = True
    assert unlike(epochs, q) >= {"how evenly", "batch sizes", "two steps"}
    paired = independent.copy()
    paired[:, 1::2] = paired[:, ::2]
    assert unlike(paired, q) >= {"batch sizes", "two examples"}
    held = np.repeat(independent[::2], 2, axis=0)
    assert unlike(held, q) >= {"two steps"}


def test_noise_has_the_standard_deviation_that_is_accounted_for() -> None:
    drawn = steps(examples=50, rate=0.2, count=1, noise=1.5, clip=2.0)
    found = drawn.noised(0, {"a": np.zeros((80, 50), np.float32), "b": np.zeros(4000)})
    assert found["a"].dtype == np.float32
    std = 1.5 * 2.0 / (0.2 * 50)
    values = np.concatenate([leaf.ravel() for leaf in found.values()])
    assert stats.kstest(values, "norm", (0, std)).pvalue > ALPHA
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values, "norm", (0, std * wrong)).pvalue < 1e-9
    assert abs(np.corrcoef(found["a"].ravel(), found["b"])[0, 1]) < APART, "each tensor has its own"
    again = drawn.noised(1, {"b": np.zeros(4000)})["b"]
    assert abs(np.corrcoef(again, found["b"])[0, 1]) < APART, "and so have steps"


def test_every_round_draws_anew_and_not_from_the_jobs_seed() -> None:
    made = noisy_steps(job(train={"batch_size": 8, "steps": 20}))
    assert made is not None
    one, two = made(100), made(100)
    assert [rows.tolist() for rows in one.batches()] != [rows.tolist() for rows in two.batches()]
    assert one.seed != two.seed
    assert not np.array_equal(one.noised(0, {"w": np.zeros(3)})["w"], two.noised(0, {"w": np.zeros(3)})["w"])


def test_rate_and_count_follow_the_sites_own_size() -> None:
    made = noisy_steps(job(train={"batch_size": 8, "epochs": 2}, rounds=3))
    assert made is not None
    assert (made(100).terms.rate, made(100).count, made(100).terms.rounds) == (0.08, 25, 75)
    small = made(5)
    assert (small.terms.rate, small.count) == (1.0, 2)
    assert [rows.tolist() for rows in small.batches()] == [list(range(5))] * 2, "a rate of 1 takes everybody"
    assert noisy_steps(job(privacy=None)) is None


# --- clipped sums


def network() -> nn.Module:
    with bridge.seeded(0, "test"):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed)
    return drawn.normal(0, 2, (rows, 5)).astype(np.float32), drawn.integers(0, 3, rows)


def brute(module: nn.Module, x: np.ndarray, y: np.ndarray, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """Return the clipped sum by one backward pass an example, and the norms."""
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    norms = []
    for row in range(len(y)):
        module.zero_grad()
        nn.functional.cross_entropy(module(torch.tensor(x[row])), torch.tensor(y[row])).backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        norm = float(torch.cat([g.ravel() for g in grads.values()]).norm())
        norms.append(norm)
        for name, g in grads.items():
            total[name] += g * min(1.0, clip / norm)
    return total, norms


def test_clipped_sum_of_a_torch_model_is_that_of_a_loop() -> None:
    x, y = data(9)
    f = of_torch(network(), nn.functional.cross_entropy)
    expected, norms = brute(network(), x, y, 1.2)
    assert min(norms) < 1.2 < max(norms)
    assert f.clipped is not None
    found = f.clipped({n: f.lift(p) for n, p in f.params.items()}, (f.lift(x), f.lift(y)), 1.2)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-5, atol=1e-6)


class Recurrent(nn.Module):
    """A sequence model, which ``torch.func.vmap`` does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[..., None])[0].mean(-2))


def test_clipped_sum_of_a_recurrent_model_is_that_of_a_loop() -> None:
    x, y = data(9)
    with bridge.seeded(0, "test"):
        module = Recurrent()
    expected, norms = brute(module, x, y, 0.9)
    assert min(norms) < 0.9 < max(norms)
    f = of_torch(module, nn.functional.cross_entropy)
    assert f.clipped is not None
    found = f.clipped({n: f.lift(p) for n, p in f.params.items()}, (f.lift(x), f.lift(y)), 0.9)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-6)


def test_clipped_sum_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(9)
    f = of_torch(network(), nn.functional.cross_entropy)
    assert f.clipped is not None
    lifted = {n: f.lift(p) for n, p in f.params.items()}
    whole = f.clipped(lifted, (f.lift(x), f.lift(y)), 0.7)
    monkeypatch.setattr("hansa.client.functional.EACH_BYTES", 2 * sum(p.nbytes for p in f.params.values()))
    pieces = f.clipped(lifted, (f.lift(x), f.lift(y)), 0.7)
    for name, leaf in whole.items():
        torch.testing.assert_close(pieces[name], leaf, rtol=1e-5, atol=1e-6)


def line(params: Mapping[str, Any], batch: tuple[Any, ...]) -> tuple[float, dict[str, Any]]:
    """Return the mean loss (w·x − y)²/2 of a batch, and its gradient."""
    x, y = batch
    error = x @ params["w"] - y
    return float((error**2).mean() / 2), {"w": (error[:, None] * x).mean(0)}


def test_clipped_sum_of_a_numpy_model_is_that_of_a_loop() -> None:
    x, y = data(7)
    f = of_numpy({"w": np.ones(5)}, line)
    assert f.clipped is not None
    errors = x @ np.ones(5) - y
    each = errors[:, None] * x
    norms = np.linalg.norm(each, axis=1)
    clip = float(np.median(norms))
    expected = (each * np.minimum(1, clip / norms)[:, None]).sum(0)
    np.testing.assert_allclose(f.clipped(f.params, (x, y), clip)["w"], expected, rtol=1e-6)


def test_no_rows_give_zeros_and_a_broken_row_counts_as_zero() -> None:
    x, y = data(4)
    broken = x.copy()
    broken[2] = np.inf
    kept = [0, 1, 3]
    for f in (of_torch(network(), nn.functional.cross_entropy), of_numpy({"w": np.ones(5)}, line)):
        assert f.clipped is not None
        lifted = {n: f.lift(p) for n, p in f.params.items()}

        def total(x: Any, y: Any, f: Functional = f, lifted: Any = lifted) -> dict[str, Any]:
            assert f.clipped is not None
            return {n: f.lower(leaf) for n, leaf in f.clipped(lifted, (f.lift(x), f.lift(y)), 1.0).items()}

        assert all(not leaf.any() for leaf in total(x[:0], y[:0]).values())
        with np.errstate(invalid="ignore"):
            found = total(broken, y)
        for name, leaf in total(x[kept], y[kept]).items():
            np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)


def test_one_example_moves_the_sum_by_no_more_than_the_clip() -> None:
    grads = {"a": torch.randn(50, 3, 2) * 100, "b": torch.randn(50, 4) * 1e-3}
    for row in range(50):
        one = clipped({name: g[row : row + 1] for name, g in grads.items()}, 0.25)
        assert float(torch.cat([g.ravel() for g in one.values()]).norm()) <= 0.25 * (1 + 1e-6)


def test_a_layer_over_the_batch_is_refused_by_name() -> None:
    for layer in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        model = nn.Sequential(nn.Linear(5, 4), layer)
        with pytest.raises(ModelError, match=rf"Layer '1' \({type(layer).__name__}\)"):
            Clipper(model, dict(model.named_parameters()), lambda model, batch: model(batch["x"]).sum(1))


# --- ghost clipping against one by one


class Shared(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Scaled(nn.Module):
    """A layer with a tensor that no layer of Opacus' holds, and dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.layer = nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x * self.scale))


class Mixed(nn.Module):
    """A model whose rows affect each other, which ghost clipping can't see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(x.mean(0, keepdim=True)) / 2


class Positions(nn.Module):
    """Tokens, and positions whose indices have one row for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x) + self.places(torch.arange(x.shape[1])[None])
        return self.head(self.norm(tokens)).mean(1)


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize(
    ("make", "ghost"),
    [(network, True), (Positions, True), (Shared, False), (Scaled, False), (Mixed, False)],
    ids=["layers", "positions", "a layer used twice", "a bare tensor", "mixed rows"],
)
def test_ghost_clipping_is_used_where_it_gives_the_same(make: Callable[[], nn.Module], ghost: bool) -> None:
    with bridge.seeded(1, "test"):
        model = make()
        rows = 7
        x = torch.randint(0, 11, (rows, 4)) if make is Positions else 2 * torch.randn(rows, 5)
        batch = {"x": x, "y": torch.randint(0, 3, (rows,))}
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    trainable = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in trainable.items()}
    one_by_one = Clipper(model, trainable, loss_of)
    one_by_one.ghost = False
    tried = Clipper(model, trainable, loss_of)
    probe = {name: tensor[:PROBES] for name, tensor in batch.items()}
    with one_by_one.ready(lambda: probe) as sums:
        expected = sums(batch, 0.8 / SLACK if ghost else 0.8)
    with tried.ready(lambda: probe) as sums:
        found = sums(batch, 0.8)
        empty = sums({name: tensor[:0] for name, tensor in batch.items()}, 0.8)
    assert tried.ghost is ghost
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-6)
        assert torch.equal(trainable[name], before[name]), "the trial leaves no trace"
        assert not empty[name].any()
    left = [vars(p).keys() & {"grad_sample", "_norm_sample", "_forward_counter"} for p in model.parameters()]
    assert not any(left)
    assert not any(part._forward_hooks or part._backward_hooks for part in model.modules())


def test_ghost_clipping_without_opacus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    monkeypatch.setitem(sys.modules, "opacus", None)
    model = network()
    clipper = Clipper(model, dict(model.named_parameters()), loss_of)
    x, y = (torch.tensor(array) for array in data(PROBES))
    with pytest.raises(MissingExtraError, match=r"hansa\[dp-sgd\]"), clipper.ready(lambda: {"x": x, "y": y}):
        pass


def test_ghost_clipping_leaves_out_a_broken_row_alone() -> None:
    model = network()
    x, y = data(5)
    x[3] = np.nan
    batch = {"x": torch.tensor(x), "y": torch.tensor(y)}
    kept = torch.tensor([0, 1, 2, 4])
    clipper = Clipper(model, dict(model.named_parameters()), loss_of)
    with clipper.ready(lambda: {name: t[:PROBES] for name, t in batch.items()}) as sums:
        assert clipper.ghost
        found = sums(batch, 0.5)
        expected = sums({name: t[kept] for name, t in batch.items()}, 0.5)
        nothing = sums({name: t[3:4] for name, t in batch.items()}, 0.5)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)
        assert not nothing[name].any()


# --- training


def program(f: Functional, train: TrainSection, noisy: Any, rows: int = 12) -> FunctionalProgram:
    x, y = data(rows)
    return FunctionalProgram(f, {"s": Examples((x, y))}, train, noisy=noisy)


def test_without_noise_and_clip_it_is_plain_sgd_over_poisson_batches() -> None:
    made = steps(12, rate=0.3, count=6, noise=0.0, clip=1e9)
    train = TrainSection(optimizer="sgd", lr=0.2, momentum=0.5, batch_size=4)
    f = of_torch(network(), nn.functional.cross_entropy)
    work = program(f, train, lambda n: made).train("s", plan(f.params), None)
    module = network()
    stepper = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    x, y = (torch.tensor(array) for array in data(12))
    for rows in made.batches():
        stepper.zero_grad()
        (nn.functional.cross_entropy(module(x[rows]), y[rows], reduction="sum") / (0.3 * 12)).backward()
        stepper.step()
    for name, p in module.named_parameters():
        np.testing.assert_allclose(work.params[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_a_torch_loop_makes_the_same_steps_as_a_functional_one() -> None:
    fixed = Secret(bytes(KEY_BYTES))  # a step of Adam's from a gradient next to zero would be as long as its rounding
    made = steps(12, rate=0.5, count=5, noise=0.7, clip=0.5, secret=fixed)
    x, y = (torch.tensor(array) for array in data(12))
    for train in (TrainSection(optimizer="adamw", lr=0.01, weight_decay=0.1), TrainSection(optimizer="sgd", lr=0.1)):
        f = of_torch(network(), nn.functional.cross_entropy)
        expected = program(f, train, lambda n: made).train("s", plan(f.params), None).params
        module = network()
        trainable = dict(module.named_parameters())
        clipper = Clipper(module, trainable, loss_of)
        clipper.ghost = False
        with clipper.ready(dict) as sums:
            done = bridge.train_privately(
                trainable, made, lambda rows, sums=sums: sums({"x": x[rows], "y": y[rows]}, 0.5), train
            )
        assert (done.steps.count, done.sums, done.completed) == (5, {}, 1.0)
        for name, p in trainable.items():
            np.testing.assert_allclose(p.detach(), expected[name], rtol=1e-4, atol=1e-5)


def test_what_leaves_a_site_is_noised_as_stated_and_brings_no_metrics() -> None:
    """With gradients of zero, an update is the noise."""
    f = of_numpy({"w": np.zeros(4000)}, lambda params, batch: (0.0, {"w": np.zeros(4000)}))
    made = noisy_steps(job(train={"batch_size": 5, "steps": 1}))
    train = TrainSection(optimizer="sgd", lr=0.5, batch_size=5, steps=1)
    updates = []
    for round in (1, 1):
        work = program(f, train, made, rows=10).train("s", plan(f.params, round), None)
        assert (dict(work.sums), work.num_examples, work.completed, work.steps.count) == ({}, 10, 1.0, 1)
        updates.append(work.params["w"])
        std = 0.5 * 4.0 * 1.0 / 5  # learning rate × noise multiplier × clip / expected batch
        assert stats.kstest(work.params["w"], "norm", (0, std)).pvalue > ALPHA
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(work.params["w"], "norm", (0, std * wrong)).pvalue < 1e-9
    assert abs(np.corrcoef(*updates)[0, 1]) < APART, "the same round, trained again, has other noise"


def test_an_empty_batch_makes_a_noisy_step() -> None:
    made = steps(10, rate=1e-12, count=3)
    assert [len(rows) for rows in made.batches()] == [0, 0, 0]
    f = of_torch(network(), nn.functional.cross_entropy)
    work = program(f, TrainSection(optimizer="sgd"), lambda n: made, rows=10).train("s", plan(f.params), None)
    assert work.steps.count == 3
    assert all(not np.array_equal(work.params[name], leaf) for name, leaf in f.params.items())


def test_dropout_is_drawn_for_each_example_and_from_the_secret() -> None:
    module = nn.Sequential(nn.Linear(5, 30), nn.Dropout(0.5), nn.Linear(30, 3))
    f = of_torch(module, nn.functional.cross_entropy)
    x, y = data(1)
    assert f.clipped is not None
    lifted = {n: f.lift(p) for n, p in f.params.items()}
    batch = (f.lift(np.repeat(x, 2, 0)), f.lift(np.repeat(y, 2, 0)))
    with f.scope(1):
        both = f.clipped(lifted, batch, 1e9)["0.bias"]
    with f.scope(1):
        first = f.clipped(lifted, tuple(array[:1] for array in batch), 1e9)["0.bias"]
    assert not torch.allclose(both, 2 * first), "two equal rows have masks of their own"
    made = [steps(12, 1.0, 1, noise=0.0, clip=1e9) for _ in range(2)]
    found = [
        program(f, TrainSection(optimizer="sgd"), lambda n, one=one: one).train("s", plan(f.params), None).params
        for one in made
    ]
    assert not np.array_equal(found[0]["0.bias"], found[1]["0.bias"]), "the job's seed does not give the masks"


def test_time_that_runs_out_means_fewer_steps() -> None:
    f = of_torch(network(), nn.functional.cross_entropy)
    train = TrainSection(optimizer="sgd", max_seconds=1e-9)
    work = program(f, train, lambda n: steps(12, 0.5, 8)).train("s", plan(f.params), None)
    assert (work.steps.count, work.completed) == (1, 1 / 8)


def test_half_precision_is_refused() -> None:
    f = of_torch(network().to(torch.bfloat16), nn.functional.cross_entropy)
    with pytest.raises(ModelError, match="bfloat16; dp-sgd trains float32 only"):
        program(f, TrainSection(), lambda n: steps(12, 0.5, 1)).train("s", plan(f.params), None)


def test_a_strategys_term_is_added_after_the_noise() -> None:
    """FedProx's pull and SCAFFOLD's controls know no example but through what is noised, so they need no clip."""
    f = of_numpy({"w": np.zeros(6)}, lambda params, batch: (0.0, {"w": np.zeros(6)}))
    made = steps(10, 0.5, 4, noise=0.0)
    train = TrainSection(optimizer="sgd", lr=0.5)
    pulled = np.arange(6.0) * 100
    for strategy, context in (
        (fedprox(mu=0.1), {"start": {"w": pulled}}),
        (scaffold(), {"correction": {"w": -pulled * 0.1}}),
    ):
        assert strategy.rule.adjust is not None
        work = program(f, train, lambda n: made, 10).train(
            "s", plan(f.params), Correction(context, strategy.rule.adjust)
        )
        by_hand = np.zeros(6)
        for _ in range(4):
            grad = 0.1 * (by_hand - pulled) if strategy.name == "fedprox" else -0.1 * pulled
            by_hand = by_hand - 0.5 * grad
        np.testing.assert_allclose(work.params["w"], by_hand)


# --- what is refused


def refusal(asked: Job, traits: frozenset[Trait]) -> str:
    with pytest.raises(FitError) as caught:
        check_fit(pieces_of(asked, traits, Course(asked.name, ("a",), asked.strategy)))
    return str(caught.value)


BOUNDED = frozenset({Trait.BOUNDS_EXAMPLES})


def test_what_dp_sgd_does_not_go_with() -> None:
    assert "no bound can be put on what one example does" in refusal(job(), frozenset())
    assert "leave out train.clip_grad" in refusal(job(train={"clip_grad": 1.0}), BOUNDED)
    assert "trains on the same data once more" in refusal(job(baselines={"local": True}), BOUNDED)
    for strategy in ("fedavg", "fedprox", "fedadam", "scaffold"):
        asked = job(strategy=strategy, train={"optimizer": "sgd"})
        check_fit(pieces_of(asked, BOUNDED, Course(asked.name, ("a",), asked.strategy)))


def test_a_program_says_whether_it_can_bound_examples() -> None:
    f = of_torch(network(), nn.functional.cross_entropy)
    private = program(f, TrainSection(), lambda n: steps(12, 0.5, 1))
    assert private.traits >= {Trait.BOUNDS_EXAMPLES, Trait.STEPWISE}
    assert Trait.BOUNDS_EXAMPLES not in program(f, TrainSection(), None).traits, "it would not draw noise"
    bare = Functional(f.params, f.gradient, f.rows)
    assert Trait.BOUNDS_EXAMPLES not in program(bare, TrainSection(), lambda n: steps(12, 0.5, 1)).traits


@pytest.mark.parametrize(
    "wrong",
    [{"clip": 0}, {"clip": -1}, {"clip": math.nan}, {"clip": math.inf}, {"noise_multiplier": 0}, {"delta": 0},
     {"noise_multiplier": None}, {"epsilon": 1.0}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    good = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(JobError, match="privacy"):
        job(privacy={**good, **wrong})


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    asked = job(privacy={"mechanism": "dp-sgd", "clip": 1.0, "epsilon": 1e-9, "delta": 1e-12, "accountant": "rdp"})
    made = noisy_steps(asked)
    assert made is not None
    with pytest.raises(PrivacyError, match="No noise multiplier"):
        made(100).noised(0, {"w": np.zeros(1)})


# --- the ε that is shown


@pytest.mark.parametrize(
    ("accountant", "book", "golden"), [("rdp", RdpAccountant, 2.549), ("pld", PLDAccountant, 2.341)]
)
def test_the_plans_epsilon_is_that_of_the_steps_that_are_made(accountant: str, book: Any, golden: float) -> None:
    """(q .1, σ 4, 500 steps, δ 1e-5), a golden value; 100 rounds of 5 steps of 10 of 100 examples."""
    private = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5, "accountant": accountant}
    asked = job(rounds=100, train={"batch_size": 10, "steps": 5}, privacy=private)
    shown = plan_of(asked, 2, 100)
    made = noisy_steps(asked)
    assert shown is not None
    assert made is not None
    ran = made(100)
    own = book().compose(PoissonSampledDpEvent(ran.terms.rate, GaussianDpEvent(4.0)), asked.rounds * ran.count)
    for claim in shown.claims:
        assert claim.epsilon == pytest.approx(own.get_epsilon(1e-5), rel=1e-6)
        assert claim.epsilon == pytest.approx(golden, abs=2e-3)


def test_an_epsilon_asked_for_is_met_by_each_site() -> None:
    private = {"mechanism": "dp-sgd", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5, "accountant": "rdp"}
    made = noisy_steps(job(rounds=10, train={"batch_size": 10, "steps": 5}, privacy=private))
    assert made is not None
    for examples in (50, 200):
        ran = made(examples)
        own = RdpAccountant().compose(
            PoissonSampledDpEvent(10 / examples, GaussianDpEvent(ran.terms.noise_multiplier)), 50
        )
        assert 1.98 < own.get_epsilon(1e-5) <= 2.0
