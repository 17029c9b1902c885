# SPDX-License-Identifier: Apache-2.0
"""What sites bound and noise under a plan, and what the server adds: against closed forms and by statistics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

import toys
from hansa.core import settle
from hansa.core import tree as trees
from hansa.core.config import PrivacySection
from hansa.core.filter import Given
from hansa.core.values import Aggregate, Model, Update
from hansa.errors import FitError, NonFiniteError, PrivacyError
from hansa.privacy.draws import Secret
from hansa.privacy.matrix import coefficients, errors, factorised
from hansa.privacy.plan import SLACK, Terms
from hansa.privacy.protect import CLIP, COUNT, bounded, grid_of, protected, share_of_noise
from hansa.runs.run import list_runs
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints
from hansa.strategies.fedavg import fedavg

SIZE = 20_000


def section(**values) -> PrivacySection:
    return PrivacySection(**{"mechanism": "central", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, **values})


def terms(rounds: int = 10, rate: float = 1.0, **values) -> Terms:
    return Terms(section(**values), rounds, rate)


def update(delta: np.ndarray, examples: float = 1024.0) -> Update:
    return Update("s0", 1, 0, {"delta": {"w": delta}}, examples / 1024, {"loss_sum": 3.0, "examples": examples})


def rejects(draws: np.ndarray, std: float) -> bool:
    """Secrets are fresh, so the level is one that no suite ever meets by chance; 2/3 and 3/2 are far beyond it."""
    return bool(stats.kstest(draws / std, "norm").pvalue < 1e-7)


def released(strategy, sums: np.ndarray | None, population: int, model: Model | None = None, state=None) -> np.ndarray:
    """Return what one server step adds to a model of zeros."""
    model = model or Model.start({"w": np.zeros(SIZE)})
    aggregate = Aggregate({} if sums is None else {"delta": {"w": sums}}, strategy.weighed, 7.0, 3.0, population)
    stepped, _, _ = strategy.step(model, state or strategy.init(model), aggregate)
    return np.asarray(stepped.params["w"])


def test_the_mean_has_a_fixed_denominator_and_noise_of_the_stated_size():
    strategy = protected(fedavg(), terms(rate=0.25, noise_multiplier=3.0, clip=2.0), Secret.fresh())
    moved = released(strategy, np.full(SIZE, 5.0), population=40)
    noise = moved - 5.0 / (0.25 * 40)
    std = 3.0 * 2.0 * SLACK / (0.25 * 40)
    assert not rejects(noise, std)
    assert rejects(noise, std * 2 / 3)
    assert rejects(noise, std * 3 / 2)


def test_a_round_of_nobody_is_a_step_of_noise():
    noise = released(protected(fedavg(), terms(), Secret.fresh()), None, population=10)
    assert not rejects(noise, SLACK / 10)


def test_each_round_and_run_has_noise_of_its_own_and_a_round_made_again_the_same():
    secret = Secret.fresh()
    first = Model.start({"w": np.zeros(SIZE)})
    second = first.advance({})
    strategy = protected(fedavg(), terms(), secret)
    one, again = released(strategy, None, 10, first), released(strategy, None, 10, first)
    assert (one == again).all()
    for other in (
        released(strategy, None, 10, second),
        released(protected(fedavg(), terms(), Secret.fresh()), None, 10),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_a_large_model_is_noised_a_block_at_a_time_with_the_same_bits(tmp_path, monkeypatch):
    params = {"w": np.zeros((3, trees.BLOCK - 5), np.float32), "b": np.zeros((), np.float32)}
    sums = {"delta": {name: np.ones_like(leaf) for name, leaf in params.items()}}
    secret = Secret.fresh()
    outcomes = []
    for large in (trees.LARGE, 0):
        monkeypatch.setattr(trees, "LARGE", large)
        strategy = protected(fedavg(), terms(), secret)
        model, state = settle.start(strategy, params, tmp_path)
        aggregate = Aggregate(sums, strategy.weighed, 1.0, 1.0, 10)
        settled, _ = settle.step(strategy, model, state, aggregate, tmp_path)
        outcomes.append({name: np.array(leaf) for name, leaf in settled.model.params.items()})
        assert (large == 0) == bool(settled.files)
    assert all((outcomes[0][name] == outcomes[1][name]).all() for name in params)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 3.0, 1e20])
def test_an_update_is_bounded_and_says_nothing_else(length):
    direction = np.random.default_rng(0).normal(size=SIZE)
    delta = direction / np.linalg.norm(direction) * length
    sent, memory = bounded(terms(rounds=10)).apply(update(delta, 777.0), Given({"delta": True}), {})
    assert np.linalg.norm(sent.parts["delta"]["w"]) <= 1 + 1e-5
    assert np.allclose(sent.parts["delta"]["w"], delta * min(1.0, 1 / length if length else 1.0))
    assert (sent.weight, sent.sums, memory) == (1.0, {}, {})


@pytest.mark.parametrize(("examples", "weight"), [(50, 0.5), (100, 1.0), (10_000, 1.0)])
def test_weights_are_capped(examples, weight):
    sent, _ = bounded(terms(weight_cap=100)).apply(update(np.ones(3), examples), Given({"delta": True}), {})
    assert sent.weight == weight


def test_nothing_leaves_a_site_whose_update_is_not_finite():
    with pytest.raises(NonFiniteError):
        bounded(terms()).apply(update(np.array([1.0, np.nan])), Given({"delta": True}), {})


def test_local_noise_is_in_the_update_and_never_the_same():
    piece = bounded(terms(mechanism="local", noise_multiplier=2.0, clip=3.0))
    delta = np.zeros(SIZE)
    one, two = (piece.apply(update(delta), Given({"delta": True}), {})[0].parts["delta"]["w"] for _ in range(2))
    std = 2.0 * 3.0 * SLACK
    assert not rejects(one, std)
    assert rejects(one, std * 2 / 3)
    assert rejects(one, std * 3 / 2)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


def test_cohorts_are_poisson_samples():
    strategy = protected(fedavg(), terms(rate=0.3), Secret.fresh())
    sites = [f"s{i}" for i in range(10)]
    drawn = [strategy.select(sites, number) for number in range(3000)]
    sizes = np.bincount([len(cohort) for cohort in drawn], minlength=11)
    assert sizes[0] > 0, "nobody is a cohort too: 85 of them on average"
    expected = stats.binom.pmf(np.arange(11), 10, 0.3) * 3000
    tail = expected >= 5
    observed = [*sizes[tail], sizes[~tail].sum()]
    assert stats.chisquare(observed, [*expected[tail], expected[~tail].sum()]).pvalue > 1e-7
    together = np.mean([("s0" in cohort) and ("s1" in cohort) for cohort in drawn])
    assert abs(together - 0.09) < 6 * math.sqrt(0.09 * 0.91 / 3000), "each takes part by itself"
    assert drawn == [strategy.select(sites, number) for number in range(3000)], "a round made again asks the same"


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_an_adaptive_clip_follows_the_quantile_of_the_norms(quantile):
    """Norms are lognormal; the clip ends at their quantile whether it begins far below or far above."""
    norms = np.random.default_rng(1).lognormal(0.0, 1.0, 200)
    wanted = float(np.quantile(norms, quantile))
    for begin in (wanted / 30, wanted * 5):
        plan = terms(clip=begin, noise_multiplier=0.3, adaptive_clip={"quantile": quantile, "noise": 2.0})
        strategy = protected(fedavg(), plan, Secret.fresh())
        piece = bounded(plan)
        model = Model.start({"w": np.zeros(1)})
        state = strategy.init(model)
        clips = []
        for _ in range(300):
            given = Given(strategy.weighed, strategy.sent(state))
            sent = [piece.apply(update(np.array([norm])), given, {})[0] for norm in norms]
            halves = sum(float(one.parts[COUNT]["half"]) for one in sent)
            delta = sum(one.parts["delta"]["w"] for one in sent)
            sums = {"delta": {"w": delta}, COUNT: {"half": np.array(halves)}}
            model, state, notes = strategy.step(model, state, Aggregate(sums, strategy.weighed, 1.0, 1.0, len(norms)))
            clips.append(notes["clip"])
            assert strategy.bound(state) == pytest.approx(float(state[CLIP]["norm"]) * SLACK)
        assert np.mean(clips[-100:]) == pytest.approx(wanted, rel=0.1)


def test_the_noise_is_split_so_that_sum_and_count_spend_what_one_sum_would():
    """z_Δ⁻² + (2σ_b)⁻² = z⁻²: the accountant's z stands for both."""
    plan = terms(noise_multiplier=1.5, adaptive_clip={"noise": 2.0})
    strategy = protected(fedavg(), plan, Secret.fresh())
    noise = released(strategy, None, population=1)
    z_delta = (1.5**-2 - (2 * 2.0) ** -2) ** -0.5
    assert not rejects(noise, z_delta * SLACK)
    assert rejects(noise, 1.5 * 0.7 * SLACK)


def test_a_count_with_too_little_noise_is_refused_before_training(tmp_path):
    private = {**PRIVATE, "noise_multiplier": 4.0, "adaptive_clip": {"noise": 2.0}}
    with pytest.raises(PrivacyError, match="must be above 2"):
        run(toys.job(output={"dir": str(tmp_path)}, privacy=private))


def test_correlated_noise_takes_back_what_it_added():
    """The running model's noise is that of the factorisation, below independent noise of the same ε."""
    rounds, separation = 60, 6
    plan = terms(rounds=rounds, mechanism="dp-ftrl", separation=separation)
    strategy = protected(fedavg(), plan, Secret.fresh())
    model = Model.start({"w": np.zeros(2000)})
    state = strategy.init(model)
    for _ in range(rounds):
        model, state, _ = strategy.step(model, state, Aggregate({}, strategy.weighed, 0.0, 0.0, 60))
    chosen = factorised(rounds, None, separation)
    wanted = errors(coefficients(chosen.bands, rounds), rounds // separation, separation)[-1] * SLACK / 10
    noise = np.asarray(model.params["w"])
    assert not rejects(noise, wanted)
    assert rejects(noise, wanted * 3 / 2)
    independent = math.sqrt(rounds * rounds / separation) * SLACK / 10
    assert wanted < 0.6 * independent


def test_sites_take_turns_under_correlated_noise():
    strategy = protected(fedavg(), terms(rounds=9, mechanism="dp-ftrl", separation=3, participations=2), Secret.fresh())
    asked = [strategy.select(["d", "a", "c", "b"], number) for number in range(1, 10)]
    assert asked == [("a", "d"), ("b",), ("c",), ("a", "d"), ("b",), ("c",), (), (), ()]


def test_shares_of_distributed_noise_add_up_to_all_of_it():
    """Five shares of five are the whole noise, on the grid; values are within half a step of the bounded ones."""
    plan = terms(mechanism="distributed", noise_multiplier=2.0, clip=0.3)
    delta = np.linspace(-1, 1, SIZE) * 0.3 / np.sqrt(SIZE)
    shares = [share_of_noise({"delta": {"w": delta}}, plan, 5, Secret.fresh(), "t") for _ in range(5)]
    grid = grid_of(0.3)
    for share in shares:
        steps = np.asarray(share["delta"]["w"]) / grid
        assert (steps == np.rint(steps)).all()
    noise = sum(np.asarray(share["delta"]["w"]) for share in shares) - 5 * delta
    std = 2.0 * 0.3 * SLACK
    assert not rejects(noise, std)
    assert rejects(noise, std * 2 / 3)
    assert rejects(noise, std * 3 / 2)
    secret = Secret.fresh()
    one, again, other = (
        np.asarray(share_of_noise({"delta": {"w": delta}}, plan, 5, secret, label)["delta"]["w"])
        for label in ("a", "a", "b")
    )
    assert (one == again).all()
    assert (one != other).any()


PRIVATE = {"mechanism": "central", "clip": 1.0, "noise_multiplier": 1e-7, "delta": 1e-5}


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_a_job_without_noise_to_speak_of_is_fedavg_over_clipped_updates(tmp_path, engine):
    job = toys.job(rounds=1, output={"dir": str(tmp_path)}, privacy=PRIVATE, engine={"name": engine})
    done = run(job)
    moved = []
    for site in toys.SITES:
        a, b = toys.CURVATURES[site], toys.TARGETS[site]
        move = np.full(4, b * (1 - (1 - toys.LR * a) ** toys.STEPS))
        moved.append(move * min(1.0, 1 / np.linalg.norm(move)))
    got = Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load().model.params["w"]
    assert np.allclose(got, np.mean(moved, axis=0), atol=1e-5)


def test_a_private_run_tells_what_it_promises_and_no_more(tmp_path):
    done = run(toys.job(rounds=8, output={"dir": str(tmp_path)}, privacy=PRIVATE, cohort={"sample": 0.5}))
    report = done.report
    assert report["privacy"]["claims"][0]["adversary"] == "the public"
    assert all(site["labels"] == {} for site in report["sites"])
    for record in report["rounds"]:
        assert not any(name.startswith("train_") and name != "train_seconds" for name in record["metrics"])
        for metrics in record["site_metrics"].values():
            assert not {"train_loss", "train_examples"} & metrics.keys()
        assert (record["asked"], record["accepted"], record["bytes_up"]) == ([], [], 0)
    assert any(record["asked"] for record in done.records), "the operator knows; nobody in 8 rounds is 1 in 2^24"
    page = (done.directory / "report.html").read_text()
    assert "against the public rests on it" in page
    assert list(done.directory.rglob("*.key")) == [], "the secret goes when the run is finished"
    json.dumps(report["privacy"])


def test_a_run_that_is_resumed_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    """The same secret given to both: cohorts and noise are those of an undisturbed run."""
    monkeypatch.setattr(Secret, "fresh", lambda: None)
    monkeypatch.setattr("secrets.token_bytes", lambda count: b"k" * count)
    values = {"privacy": {**PRIVATE, "noise_multiplier": 1.0}, "cohort": {"sample": 0.5}}
    whole = run(toys.job(rounds=5, output={"dir": str(tmp_path / "whole")}, **values))
    job = toys.job(rounds=5, output={"dir": str(tmp_path / "cut")}, **values)
    write = Checkpoints.write

    def cut(self, record):
        write(self, record)
        if record.round == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "write", cut)
    with pytest.raises(BaseException):  # noqa: B017
        run(job)
    monkeypatch.setattr(Checkpoints, "write", write)
    (stopped,) = list_runs(tmp_path / "cut")
    key = stopped.directory / "work" / "protection.key"
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("secrets.token_bytes", lambda count: b"other" * count)
    assert run(job, resume=True).report["model"]["sha256"] == whole.report["model"]["sha256"]


def test_an_update_above_the_clip_is_rejected_whatever_its_site_says(tmp_path, monkeypatch):
    monkeypatch.setattr("hansa.core.bound.clip", lambda parts, max_norm: (parts, 0.0))
    done = run(toys.job(rounds=1, output={"dir": str(tmp_path)}, privacy=PRIVATE, cohort={"quorum": 1}))
    reasons = {absent["site"]: absent["reason"] for absent in done.records[0]["absent"]}
    assert reasons
    assert all("no site's may exceed" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"workflow": "cyclic"}, "whole model leaves each site"),
        ({"strategy": "scaffold"}, "share one bound"),
        ({"cohort": {"late": "accept", "deadline_s": 5.0}}, "nobody has accounted"),
        ({"baselines": {"local": True}}, "without noise"),
    ],
)
def test_what_does_not_compose_is_refused(tmp_path, values, reason):
    job = toys.job(output={"dir": str(tmp_path)}, privacy=PRIVATE, **values)
    with pytest.raises(FitError, match=reason):
        run(job)


def test_a_number_of_sites_is_no_probability(tmp_path):
    job = toys.job(output={"dir": str(tmp_path)}, privacy=PRIVATE, cohort={"sample": 2})
    with pytest.raises(FitError, match="as a fraction"):
        run(job)
