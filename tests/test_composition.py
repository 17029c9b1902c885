# SPDX-License-Identifier: Apache-2.0
"""Every pair of mechanisms, and the triples that rules name: refused for a reason that names both, or run and equal to
the same federation done by hand.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import by_hand
import regression
from hansa import registry
from hansa.client import work
from hansa.core import fit
from hansa.core.config import Algorithm, CohortSection, Job
from hansa.core.values import Model, Snapshot
from hansa.errors import FitError, PrivacyError
from hansa.privacy import draws
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.draws import Secret
from hansa.privacy.plan import SLACK, plan_of, terms_of_job
from hansa.runs import composition
from hansa.runs.baselines import Baselines
from hansa.runs.composition import BASE, SITES, inventory, job_of, pairs, refusals, triples
from hansa.runs.pieces import check, workflow_of
from hansa.runs.progress import Silent
from hansa.simulation.batched import Batched
from hansa.simulation.local import Local
from hansa.simulation.processes import Processes
from hansa.workers import runner
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import sample

MECHANISMS = inventory()
ALL = list(pairs(MECHANISMS))
REFUSED = [pair for pair in ALL if refusals(pair)]
NOT_RUN = {"training code", "a deployment"}
"""Whose own tests run them: they take long to begin."""
RUN = [pair for pair in ALL if not refusals(pair) and not any({m.family, m.name} & NOT_RUN for m in pair)]
EVERYBODY = "a site that was late is asked again in the next round, and only its new answer counts."
"""The one rule that no pair is about: late answers bring a sample along, as they can't be without."""
IN_WORKERS = [pair for pair in RUN if any(m.name == "processes" for m in pair)]
HERE = [pair for pair in RUN if pair not in IN_WORKERS]
KEY = b"by hand, and by nobody's chance."
SLOW = "s5"
SEED = next(
    seed for seed in range(100) if SLOW in sample(SITES, 0.8, seed, 1) and SLOW not in sample(SITES, 0.8, seed, 2)
)
"""With it the slow site is asked in the first round and not in the second, where its late answer may count."""


def named(mechanisms) -> str:
    return " + ".join(m.name.replace(", ", " ") for m in mechanisms)


def own(mechanism) -> set[tuple[str, str]]:
    """Return the pieces that a mechanism adds to the base job, or changes."""
    changed = set(composition.pieces([mechanism])) - set(composition.pieces([]))
    return {(piece.family, piece.name) for piece in changed}


def a_job(mechanisms, **values):
    kind = "build_torch" if any(m.name == "batched" for m in mechanisms) else "build"
    job = job_of(mechanisms, {**BASE, "seed": SEED, "recipe": f"regression:{kind}", **values})
    if job.privacy is not None and draws_far_away(job):
        return job.model_copy(update={"privacy": job.privacy.model_copy(update={"noise_multiplier": 1e-7})})
    return job


def draws_far_away(job) -> bool:
    """Say whether sites draw what can't be drawn here again; their noise is then next to nothing."""
    mechanism = job.privacy.mechanism if job.privacy else None
    return mechanism == "distributed" or (job.engine.name == "processes" and mechanism in ("local", "dp-sgd"))


class Clock:
    """The time at sites: it stands still, but while the slow one trains."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def slowed(program, clock: Clock):
    """Return ``program`` with a slow site."""

    class Slow(type(program)):
        def train(self, site, plan, correction):
            clock.now += 1e3 if site == SLOW else 0.0
            return super().train(site, plan, correction)

    return Slow(**{name: getattr(program, name) for name in ("functional", "data", "section", "noisy")})


def opened(job, directory, clock):
    if job.engine.name == "batched":
        return Batched(job, directory, regression.build_torch(job))
    return Local(job, directory, slowed(regression.build(job), clock))


async def carried_out(job, engine, directory):
    """Return the records of a job's rounds, and the scores of its baselines."""
    check(job, engine.traits, Course(job.name, SITES, job.strategy, tuple(job.filters)))
    course = Course(job.name, SITES, job.strategy, tuple(job.filters), terms_of_job(job), job.secret_sums)
    strategy, _ = course.pieces(Secret(KEY))
    model = Model.start(await engine.initial())
    start = Snapshot(0, model, strategy.init(model))
    rounds = workflow_of(job).rounds(job, strategy, engine.cohort(course), engine.peers, start, directory)
    async with contextlib.aclosing(rounds):
        records = [record async for record in rounds]
    scores = {}
    made = Baselines(job, engine, model.native(), directory, {}, scores.__setitem__, job.secret_sums)
    await made.run(Silent())
    return records, scores


def assert_right(job, records, scores) -> None:
    """Assert that a run came to what the same job comes to by hand."""
    hand = by_hand.ByHand(job, records, Secret(KEY), noisy=not draws_far_away(job))
    near = 1e-9
    if job.secret_sums is not None or draws_far_away(job):
        near = 1e-5
    if job.strategy.robust is not None and job.strategy.robust.rule == "geometric-median":
        near = 1e-3
    assert len(records) == job.rounds
    for record, expected in zip(records, hand.models, strict=True):
        np.testing.assert_allclose(np.asarray(record.model.params["w"]), expected, rtol=near, atol=near)
        assert len(record.asked) == asked(job, record.round), record
        missing = {SLOW} if job.cohort.deadline_s and job.engine.name == "local" else set()
        assert set(record.asked) - set(record.accepted) == missing & set(record.asked), record.absent
    if job.privacy is not None:
        promise = plan_of(job, len(SITES), examples=min(regression.ROWS.values()))
        assert promise.claims[0].epsilon == epsilon([released(job)], job.privacy.delta)
    assert scores.keys() == baselines(job)
    plain = by_hand.ByHand(job.model_copy(update={"strategy": Algorithm(name="fedavg")}), [], Secret(KEY), noisy=True)
    for name, found in scores.items():
        rounds = {"base": 0, "central": job.rounds * len(SITES)}.get(name, job.rounds)
        expected = by_hand.loss(plain.alone(name.removeprefix("local."), rounds))
        assert found.overall == (pytest.approx({"loss": expected}) if job.secret_sums is None else {})


def released(job) -> Release:
    """Return what a job's rounds release, for those who can't see who takes part."""
    noise = job.privacy.noise_multiplier
    return {
        "central": Release(noise, job.cohort.sample, job.rounds),
        "local": Release(noise / 2, 1.0, job.rounds),
        "dp-sgd": Release(noise, 1.0, job.rounds * job.train.steps),  # every example is in every batch
        "dp-ftrl": Release(noise),
        "distributed": Release(noise, 1.0, job.rounds, 2.0**23),
    }[job.privacy.mechanism]


def asked(job, number: int) -> int:
    if job.privacy is not None and job.privacy.mechanism == "dp-ftrl":
        return 3
    if job.privacy is not None and job.privacy.mechanism == "central":
        return sum(Secret(KEY).generator("cohort", number).random(len(SITES)) < job.cohort.sample)
    return 6 if job.cohort.sample == 1.0 else 5


def baselines(job) -> set[str]:
    wanted = job.baselines
    alone = {f"local.{site}" for site in SITES} if wanted.local else set()
    return alone | {name for name in ("base", "central") if getattr(wanted, name)}


def test_the_list_has_every_name_and_key_of_a_job() -> None:
    said = {name for m in MECHANISMS for name in [m.name, *m.fragment.get("cohort", {})]}
    for table in ("strategies", "filters", "workflows"):
        assert set(registry.TABLES[table]) - {"fedavg", "scatter-gather"} <= said
    assert set(CohortSection.model_fields) - {"sites"} <= said
    sections = {name for name, field in Job.model_fields.items() if field.default is None}
    assert sections - {"data", "partition"} <= {key for m in MECHANISMS for key in m.fragment}
    assert len({str(m) for m in MECHANISMS}) == len(MECHANISMS)


def test_the_page_is_what_the_rules_make() -> None:
    page = Path(__file__).parents[1] / "docs" / "composition.md"
    assert page.read_text(encoding="utf-8") == composition.page(), "run `make composition`"


def test_every_rule_is_met_by_a_pair_or_a_triple() -> None:
    met = {conflict.reason for those in [*REFUSED, *triples(MECHANISMS)] for conflict in refusals(those)}
    assert {rule.reason for rule in fit.RULES} - met == {EVERYBODY}


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: named([m]))
def test_each_composes_with_the_base_job_and_is_seen(mechanism) -> None:
    assert refusals([mechanism]) == []
    assert own(mechanism) or mechanism.name in ("base", "processes")


@pytest.mark.parametrize("mechanisms", [*REFUSED, *triples(MECHANISMS)], ids=named)
async def test_what_is_refused_names_all_and_does_not_run(tmp_path, mechanisms) -> None:
    reasons = refusals(mechanisms)
    assert any(
        all({(p.family, p.name) for p in reason.pieces} & own(mechanism) for mechanism in mechanisms)
        for reason in reasons
    ), [str(reason) for reason in reasons]
    with pytest.raises(FitError) as caught:
        await carried_out(a_job(mechanisms), SimpleNamespace(traits=composition.traits(mechanisms)), tmp_path)
    for reason in reasons:
        assert reason.reason in str(caught.value)


@pytest.mark.parametrize("mechanisms", HERE, ids=named)
async def test_what_runs_is_right(tmp_path, monkeypatch, mechanisms) -> None:
    job, clock = a_job(mechanisms), Clock()
    if job.engine.name == "local":
        monkeypatch.setattr(runner, "time", clock)
        monkeypatch.setattr(work, "time", clock)
    if job.privacy is not None and job.privacy.mechanism in ("local", "dp-sgd"):
        monkeypatch.setattr(draws, "secrets", SimpleNamespace(token_bytes=lambda size: KEY, token_hex=lambda size: "0"))
    async with opened(job, tmp_path, clock) as engine:
        records, scores = await carried_out(job, engine, tmp_path)
    assert_right(job, records, scores)
    assert len(list(tmp_path.glob("late.*"))) <= 1, "late answers pile up"


@pytest.mark.parametrize("width", [256.0, 4.0])
async def test_an_adaptive_clip_grows_no_further_than_the_ring(tmp_path, width) -> None:
    """Steps are so long that updates grow in each round, and the clip with them: nothing wraps, and no site is lost."""
    those = [m for m in MECHANISMS if m.name in ("central, adaptive clip", "masks")]
    growing = {"train": {**BASE["train"], "lr": 5.0}, "privacy": {"adaptive_clip": {"lr": 3.0}}}
    job = a_job(those, rounds=8, secure_aggregation={"range": width}, **growing)
    async with opened(job, tmp_path, Clock()) as engine:
        records, _ = await carried_out(job, engine, tmp_path)
    hand = by_hand.ByHand(job, records, Secret(KEY), noisy=True)
    assert hand.clip == width / SLACK > 7 * job.privacy.clip
    for record, expected in zip(records, hand.models, strict=True):
        assert record.accepted == SITES
        np.testing.assert_allclose(np.asarray(record.model.params["w"]), expected, rtol=1e-6)


def test_a_clip_that_begins_beyond_the_ring_is_refused() -> None:
    those = [m for m in MECHANISMS if m.name in ("central, adaptive clip", "masks")]
    with pytest.raises(PrivacyError, match=r"clip begins at 0\.5, and secure_aggregation\.range = 0\.4 has place"):
        terms_of_job(a_job(those, secure_aggregation={"range": 0.4}))


def test_late_answers_where_everybody_is_asked_again_are_refused() -> None:
    job = job_of([], {**BASE, "cohort": {"late": "accept", "deadline_s": 60.0}})
    with pytest.raises(FitError, match=EVERYBODY):
        check(job, frozenset(), Course(job.name, SITES, job.strategy))


async def test_what_runs_in_workers_is_right(tmp_path) -> None:
    """Workers are begun once for all pairs that train alike."""
    jobs = [a_job(pair, name=f"pair-{place}") for place, pair in enumerate(IN_WORKERS)]
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        in_steps = job.privacy if job.privacy is not None and job.privacy.mechanism == "dp-sgd" else None
        alike.setdefault(repr((job.train, in_steps)), []).append(job)
    for place, group in enumerate(alike.values()):
        folder = tmp_path / str(place)
        folder.mkdir()
        async with Processes(group[0], folder, cpus=1) as engine:
            for job in group:
                records, scores = await carried_out(job, engine, folder)
                assert_right(job, records, scores)
    assert len(jobs) > 25
