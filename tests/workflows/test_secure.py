# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under masks: the model of a plain sum, whoever drops out when, and whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import toys
from hansa.core.values import Absence
from hansa.errors import FitError, PrivacyError, QuorumError
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.plan import SLACK
from hansa.runs.run import list_runs
from hansa.secagg import agreement, protocol
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints
from hansa.workers import runner, secure
from hansa.workflows import secure as server

METRICS = {"loss_sum": 1e6, "examples": 1e6}
GONE = {"s01", "s04", "s08"}


def job(tmp_path: Path, masked: bool = True, **values):
    recipe = {"name": "toys:many", **values.pop("recipe", {})}
    values = {"rounds": 3, "cohort": {"quorum": 0.5}, "output": {"dir": str(tmp_path)}, **values}
    if masked:
        values["secure_aggregation"] = {"metrics": METRICS, **values.get("secure_aggregation", {})}
    return toys.job(recipe=recipe, **values)


def final(done) -> np.ndarray:
    return np.array(Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load().model.params["w"])


def exchanging(monkeypatch, change) -> None:
    """Have ``change(phase, answers)`` see every exchange's answers."""
    exchange = runner.SecureSites.exchange

    def changed(self, course, phase, letters):
        return change(phase, exchange(self, course, phase, letters))

    monkeypatch.setattr(runner.SecureSites, "exchange", changed)


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
def test_the_model_is_that_of_the_plain_sum(tmp_path, engine, strategy):
    values = {"engine": {"name": engine}, "strategy": strategy}
    plain = run(job(tmp_path / "plain", masked=False, **values))
    masked = run(job(tmp_path / "masked", **values))
    assert np.abs(final(masked) - final(plain)).max() < 1e-7
    for mine, theirs in zip(masked.records, plain.records, strict=True):
        assert mine["accepted"] == theirs["accepted"]
        assert mine["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-6)
        assert mine["metrics"]["train_loss"] == pytest.approx(theirs["metrics"]["train_loss"], rel=1e-6)
        assert mine["site_metrics"] == {}


def test_the_server_gets_uniform_bytes_of_every_site(tmp_path, monkeypatch):
    """Each single upload looks like noise; the plain update of the same job does not."""
    seen = {}
    add = server.Session._add

    def noted(self, total, reply):
        values = np.concatenate([chunk.values for chunk in reply.chunks()])
        seen.setdefault(reply.header.round, {})[reply.header.site] = values
        assert (reply.header.weight, reply.header.sums, reply.header.logged) == (1.0, {}, {})
        add(self, total, reply)

    monkeypatch.setattr(server.Session, "_add", noted)
    run(job(tmp_path, rounds=1, recipe={"size": 20_000}, secure_aggregation={"metrics": {}}))
    (uploads,) = seen.values()
    assert len(uploads) == 10
    for values in uploads.values():
        counts = np.bincount(values.view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # chi-square with 255 degrees: p < 1e-8


@pytest.fixture(scope="module")
def in_the_open(tmp_path_factory):
    """One round in the open of all ten sites, and of those that stay."""
    folder = tmp_path_factory.mktemp("open")

    def without(left):
        faults = {"recipe": {"faults": {f"{site}:1": "raise" for site in left}}}
        return run(job(folder / str(len(left)), masked=False, rounds=1, **faults))

    return {"all": without([]), "stayed": without(sorted(GONE))}


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("phase", ["advertise", "share", "receive", "train", "vote", "reveal"])
def test_three_of_ten_drop_out_in_any_phase(tmp_path, monkeypatch, in_the_open, engine, phase):
    """Up to the upload they are not in the sum; after it they are, and the others unmask it."""
    plain = in_the_open["all" if phase in ("vote", "reveal") else "stayed"]

    def drop(now, answers):
        return {
            site: Absence(site, "lost", "gone") if now == phase and site in GONE else answer
            for site, answer in answers.items()
        }

    exchanging(monkeypatch, drop)
    faults = {"recipe": {"faults": {f"{site}:1": "raise" for site in GONE}}} if phase == "train" else {}
    values = {"rounds": 1, "engine": {"name": engine}, "secure_aggregation": {"metrics": {}}}
    done = run(job(tmp_path, **values, **faults))
    assert np.abs(final(done) - final(plain)).max() < 1e-7
    assert done.records[0]["accepted"] == plain.records[0]["accepted"]
    assert {absent["site"] for absent in done.records[0]["absent"]} == GONE


@pytest.mark.parametrize("phase", ["advertise", "share", "vote", "reveal"])
def test_too_few_left_means_no_sum(tmp_path, monkeypatch, phase):
    def drop(now, answers):
        return {
            site: Absence(site, "lost", "its line is cut") if now == phase and site > "s02" else answer
            for site, answer in answers.items()
        }

    exchanging(monkeypatch, drop)
    with pytest.raises(QuorumError, match="its line is cut"):
        run(job(tmp_path, rounds=1))
    (stopped,) = list_runs(tmp_path)
    assert not list((stopped.directory / "work").glob("*.plain")), "nothing was unmasked"


def test_a_masked_vector_that_is_none_is_rejected(tmp_path, monkeypatch):
    masked = secure.Sessions.masked

    def broken(self, course, update, task):
        sent = masked(self, course, update, task)
        if update.site != "s03" or task != "train":
            return sent
        vector = np.asarray(sent.parts[secure.MASKED][secure.VECTOR])[:-1]
        return type(sent)(**{**sent.__dict__, "parts": {secure.MASKED: {secure.VECTOR: vector}}})

    monkeypatch.setattr(secure.Sessions, "masked", broken)
    done = run(job(tmp_path, rounds=1))
    (absent,) = done.records[0]["absent"]
    assert (absent["site"], absent["kind"]) == ("s03", "rejected")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"range": 1e-4, "weight_cap": 100.0}, "'w' of 'delta'"),
        ({"weight_cap": 12.0}, "weight"),
        ({"metrics": {"lossy": 1.0}}, "lossy"),
    ],
)
def test_a_value_outside_its_range_is_told_and_not_sent(tmp_path, section, reason):
    with pytest.raises(QuorumError, match=reason):
        run(job(tmp_path, rounds=1, secure_aggregation={"metrics": {}, **section}))


def test_a_server_that_widens_the_terms_is_refused(tmp_path, monkeypatch):
    """Sites work the terms out by themselves."""
    bounds_of = server.bounds_of

    def widened(section, private, num_sites):
        bounds = bounds_of(section, private, num_sites)
        return replace(bounds, largest=1.5 * bounds.largest)

    monkeypatch.setattr(server, "bounds_of", widened)
    with pytest.raises(QuorumError, match="other terms of secure aggregation than the job's"):
        run(job(tmp_path, rounds=1))


def test_central_noise_on_a_sum_that_nobody_saw_apart(tmp_path):
    """Clip, masks and noise together; after every site's last turn there is a step of noise alone."""
    private = {"mechanism": "dp-ftrl", "clip": 0.5, "noise_multiplier": 1e-6, "delta": 1e-5, "participations": 2}
    done = run(job(tmp_path, privacy=private, rounds=3))
    assert [len(record["accepted"]) for record in done.records] == [10, 10, 0]
    for record in done.records:
        assert not any(name.startswith("train_") for name in record["metrics"])


def test_a_drawn_cohort_under_masks_and_noise_at_the_server_is_refused(tmp_path):
    """It may be of too few to sum, and one more site then moves the model by the updates of three."""
    private = {"mechanism": "central", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(FitError, match="by the updates of all of them"):
        run(job(tmp_path, privacy=private, cohort={"sample": 0.5}))
    run(job(tmp_path, privacy=private, rounds=1))


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_distributed_noise_is_enough_for_the_fewest_that_are_summed(tmp_path, engine):
    """Of ten sites at least seven are summed and two are corrupt: each adds a fifth, so ten add twice the noise."""
    private = {"mechanism": "distributed", "clip": 1.0, "noise_multiplier": 3.0, "delta": 1e-5}
    values = {"recipe": {"size": 20_000}, "rounds": 1, "engine": {"name": engine}}
    done = run(job(tmp_path / "noisy", privacy=private, secure_aggregation={"metrics": {}}, **values))
    plain = run(
        job(
            tmp_path / "plain",
            masked=False,
            privacy={**private, "mechanism": "central", "noise_multiplier": 1e-6},
            **values,
        )
    )
    noise = final(done) - final(plain)
    std = 3.0 * SLACK * np.sqrt(10 / 5) / 10
    assert stats.kstest(noise / std, "norm").pvalue > 1e-7
    assert stats.kstest(noise / std * 3 / 2, "norm").pvalue < 1e-4
    assert stats.kstest(noise / std * 2 / 3, "norm").pvalue < 1e-4
    claims = {claim["adversary"]: claim["epsilon"] for claim in done.report["privacy"]["claims"]}
    assert claims["the server"] == claims["the public"] == pytest.approx(epsilon([Release(3.0)], 1e-5, "rdp"), rel=0.01)


def test_distributed_noise_needs_masks(tmp_path):
    private = {"mechanism": "distributed", "clip": 1.0, "noise_multiplier": 3.0, "delta": 1e-5}
    with pytest.raises(FitError, match="only a sum that nobody sees apart"):
        run(job(tmp_path, masked=False, privacy=private))


CHILD = """
import os, signal, sys
import toys
from hansa.core.config import parse
from hansa.simulation.run import run
from hansa.workflows import secure

job, mode, phase, round = parse(__import__("json").loads(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])
if phase != "none":
    from hansa.workers import runner
    exchange = runner.SecureSites.exchange
    count = [0]

    def deadly(self, course, now, letters):
        answers = exchange(self, course, now, letters)
        count[0] += now == phase and course.name == job.name
        if now == phase and count[0] == round:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers

    runner.SecureSites.exchange = deadly
run(job, resume=mode == "resume")
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run that nothing kills."""
    return run(job(tmp_path_factory.mktemp("calm")))


@pytest.mark.parametrize(
    ("phase", "session"),
    [("advertise", 2), ("reveal", 2)]
    + [(phase, 3) for phase in ("advertise", "share", "receive", "vote", "reveal", "finish")],
)
def test_sigkill_in_any_phase_ends_with_the_same_model(tmp_path, calm, phase, session):
    """A round's evaluation is killed, or the next one's training; then the resumed run's first session too."""
    values = json.dumps(job(tmp_path).model_dump(mode="json"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def child(mode: str, phase: str, round: int) -> int:
        command = [sys.executable, "-c", CHILD, values, mode, phase, str(round)]
        return subprocess.run(command, env=env, timeout=120).returncode

    assert child("new", phase, session) == -signal.SIGKILL
    assert child("resume", phase, 1) == -signal.SIGKILL
    assert child("resume", "none", 0) == 0
    (done,) = list_runs(tmp_path)
    assert np.abs(final(done) - final(calm)).max() < 1e-7
    for mine, theirs in zip(done.records, calm.records, strict=True):
        assert (mine["accepted"], mine["absent"]) == (theirs["accepted"], [])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"workflow": "cyclic"}, "no sum that masks could cancel in"),
        ({"cohort": {"late": "accept", "deadline_s": 5.0}}, "cancel in no other"),
        ({"filters": ["cast"]}, "elements of a ring"),
        ({"baselines": {"local": True}}, "judged and shown"),
    ],
)
def test_what_does_not_compose_is_refused(tmp_path, values, reason):
    with pytest.raises(FitError, match=reason):
        run(job(tmp_path, **values))


def test_two_sites_are_too_few(tmp_path):
    with pytest.raises(FitError, match="at least 3 updates, and a round asks 2"):
        run(job(tmp_path, recipe={"num_sites": 2}))


def test_a_process_that_is_late_does_not_write_over_a_newer_session(tmp_path):
    """A worker that still masks for the first attempt, when the agent has begun the second."""
    section = job(tmp_path).secure_aggregation
    bounds = server.bounds_of(section, None, 3)
    sites = ("s00", "s01", "s02")
    course = runner.Course("toy", sites, job(tmp_path).strategy, secure=section)
    sessions = secure.Sessions(tmp_path, lambda site: secure.simulated(tmp_path, site))

    def letter(attempt: int) -> bytes:
        return protocol.pack(agreement.terms(section, bounds, "toy", 2, attempt, sites, {}, {}))

    def advertise(attempt: int) -> bytes:
        return sessions.exchange(course, "s00", "advertise", letter(attempt))

    first = advertise(1)
    assert advertise(1) == first
    late = sessions._open("toy", "s00")
    second = advertise(2)
    with pytest.raises(PrivacyError, match="meanwhile"):
        late.finish()
    assert advertise(2) == second
    sessions.exchange(course, "s00", "finish", letter(1))  # of the one before: over already
    assert advertise(2) == second
    sessions.exchange(course, "s00", "finish", letter(2))
    with pytest.raises(PrivacyError, match="over"):
        sessions.exchange(course, "s00", "share", letter(2))
