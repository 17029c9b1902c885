# SPDX-License-Identifier: Apache-2.0
"""Gradient inversion recovers examples from a real job's plain updates, and finds noise in protected ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import audited
from hansa.audit import inversion, uploads
from hansa.audit.finding import Finding, Measure, Skipped
from hansa.audit.subject import Subject, opened
from hansa.core.config import Job
from hansa.homomorphic import ckks
from hansa.runs.progress import Silent
from hansa.secagg import keys
from hansa.sinks import plots
from tiny import BERT, rows

MASKS = {"minimum": 3}
SECRET = {
    "masks": {"secure_aggregation": MASKS},
    "encryption": {"homomorphic_encryption": {"key_site": "s1", "full_model": True}},
}
RARE = 1e-7
"""Masks and keys are fresh in each run of a test, and this says how often it fails by that."""
DP_SGD = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 2.5, "delta": 1e-4}


def found(job: Job) -> Finding:
    with opened(job) as subject:
        finding = inversion.attack(subject, np.random.default_rng(0), Silent())
    assert isinstance(finding, Finding)
    return finding


def measure(finding: Finding, name: str) -> Measure:
    return next(each for each in finding.measures if each.name.startswith(name))


def guesses(subject: Subject, count: int) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Attack ``count`` single uploads: the guess, the example, and whether the label was read off."""
    strongest = uploads.alone(subject)
    program, done = subject.program, []
    for upload, _ in uploads.single_uploads(strongest, count, np.random.default_rng(1), Silent()):
        batch = program.batch(upload.site, upload.rows)
        guess = inversion.from_layer(upload.delta["0.weight"], upload.delta["0.bias"], 1)[0]
        label = inversion.label_of(upload.delta["2.bias"]) == batch["targets"][0]
        done.append((guess, batch["inputs"][0].astype(np.float64), bool(label)))
    assert len(done) == count
    return done


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"filters": [{"name": "clip", "max_norm": 0.01}]},
        {"privacy": {"mechanism": "central", "clip": 0.01, "noise_multiplier": 1.0, "delta": 1e-4}},
    ],
    ids=["plain", "clip alone", "noise at the server alone"],
)
def test_an_example_is_read_off_a_plain_update(tmp_path: Path, section: dict[str, Any]) -> None:
    with opened(audited.job(tmp_path, **section)) as subject:
        done = guesses(subject, 12)
    assert max(np.linalg.norm(guess - truth) / np.linalg.norm(truth) for guess, truth, _ in done) < 1e-6
    assert all(label for _, _, label in done)


def compared(job: Job) -> tuple[list[float], list[float], int]:
    """Attack 24 single uploads; return the cosines of guesses, those of guesses at noise, and the labels it got."""
    generator = np.random.default_rng(2)
    with opened(job) as subject:
        done = guesses(subject, 24)
        nothing = [uploads.noise(subject.params, generator) for _ in done]
    chance = [
        cosine(inversion.from_layer(each["0.weight"], each["0.bias"], 1)[0], truth)
        for each, (_, truth, _) in zip(nothing, done, strict=True)
    ]
    return [cosine(guess, truth) for guess, truth, _ in done], chance, sum(label for _, _, label in done)


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys.Masks, "apply", lambda masks, start, values: None)


def without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have numbers stand in the last words of a ciphertext as they are, without the masks inside."""
    without_masks(monkeypatch)
    prime, sizes = ckks.PRIMES[0], set()

    def encrypt(_self: Any, values: Any) -> Any:
        sizes.add(values.size)
        return np.concatenate([np.zeros(ckks.WORDS - values.size, np.int64), values % prime]).astype(np.uint64)

    def decrypt(_self: Any, words: Any) -> Any:
        (size,) = sizes
        found = words[words.size - size :].astype(np.int64)
        return np.concatenate([np.where(found > prime // 2, found - prime, found), np.zeros(ckks.SLOTS - size, int)])

    monkeypatch.setattr(ckks.Encryptor, "encrypt", encrypt)
    monkeypatch.setattr(ckks.Decryptor, "decrypt", decrypt)


@pytest.mark.parametrize(
    ("name", "broken"), [("masks", without_masks), ("encryption", without_encryption)], ids=SECRET.keys()
)
def test_secret_uploads_tell_no_more_than_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """And they tell all where masks or encryption do nothing, read in the same way: so the test can tell."""
    monkeypatch.setattr(uploads, "CHANCE", RARE)
    job = audited.job(tmp_path, **SECRET[name])
    found, chance, labels = compared(job)
    assert stats.ks_2samp(found, chance).pvalue > RARE
    assert not uploads.is_better(np.array(found), np.array(chance))
    assert stats.binomtest(labels, len(found), 0.25, alternative="greater").pvalue > RARE
    broken(monkeypatch)
    found, chance, labels = compared(job)
    assert min(found) > 0.999, "but for rounding to the ring's step"
    assert uploads.is_better(np.array(found), np.array(chance))
    assert labels == len(found)


def test_what_a_plain_job_s_report_says(tmp_path: Path) -> None:
    finding = found(audited.job(tmp_path))
    assert finding.verdict == "leaks"
    assert measure(finding, "one example: cosine").value > 0.999999
    assert abs(measure(finding, "one example: cosine").baseline) < 0.2
    named = measure(finding, "right example named")
    assert (named.value, named.baseline) == (1.0, 1 / 32)
    assert measure(finding, "label read off").value == 1.0
    assert measure(finding, "the job's round").value > 0, "units that one example alone excites"
    assert "32 of 32" in finding.says
    assert "<svg" in plots.svg("p", finding.pictures[0].title, finding.pictures[0].draw, finding.pictures[0].height)


@pytest.mark.parametrize("section", SECRET.values(), ids=SECRET.keys())
def test_what_a_report_says_of_secret_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any]
) -> None:
    monkeypatch.setattr(uploads, "CHANCE", RARE)
    monkeypatch.setattr(inversion, "ANALYTIC_TRIES", 20)
    monkeypatch.setattr(inversion, "SHOWN", 1)
    finding = found(audited.job(tmp_path, **section))
    assert finding.verdict in ("holds", "leaks"), "leaks would be of the sum, which the server does learn"
    assert measure(finding, "right example named").low < 0.2
    assert measure(finding, "the job's round: examples recovered from an upload").value == 0
    assert measure(finding, "the job's round: examples recovered from the sum").baseline == 0
    assert "no more than it reads in noise" in finding.says


def test_what_dp_sgd_promises_bounds_the_attack(tmp_path: Path) -> None:
    finding = found(audited.job(tmp_path, privacy=DP_SGD))
    assert finding.verdict == "holds"
    sure = finding.measures[3]
    with opened(audited.job(tmp_path, privacy=DP_SGD)) as subject:
        epsilon = subject.promised("the server")
        assert sure.bound == pytest.approx(np.exp(epsilon) / 32 + 1e-4)
        assert not sure.is_broken
        assert uploads.named(32, 32, 32, subject)[1].is_broken, "an attack that always names the right one"
        assert uploads.verdict(subject, upload=True, total=False, broken=True) == "fails"


def test_noise_follows_the_whole_job_s_epsilon(tmp_path: Path) -> None:
    asked = {"mechanism": "dp-sgd", "clip": 1.0, "epsilon": 3.0, "delta": 1e-4, "accountant": "rdp"}
    with opened(audited.job(tmp_path, rounds=3, privacy=asked)) as subject:
        assert uploads.alone(subject).plan.terms.noise_multiplier == subject.plan.terms.noise_multiplier


def test_where_sites_are_drawn_the_unprotected_job_asks_all_of_them(tmp_path: Path) -> None:
    plan = {"mechanism": "central", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
    with opened(audited.job(tmp_path, privacy=plan, cohort={"sample": 0.4})) as subject:
        open_ = uploads.unprotected(uploads.alone(subject))
        rows = {site: np.arange(1) for site in subject.sites}
        seen = uploads.one_round(open_, rows).uploads
        assert sorted(each.site for each in seen) == list(subject.sites)


def test_the_unprotected_job_is_not_masked_by_default_either(tmp_path: Path) -> None:
    with opened(audited.job(tmp_path, secure_aggregation=MASKS)) as subject:
        open_ = uploads.unprotected(uploads.alone(subject))
        seen = uploads.one_round(open_, {site: np.arange(1) for site in subject.sites}).uploads[0]
        truth = subject.program.batch(seen.site, seen.rows)["inputs"][0]
        assert cosine(inversion.from_layer(seen.delta["0.weight"], seen.delta["0.bias"], 1)[0], truth) > 0.999999


def test_images_are_recovered_without_a_fully_connected_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "STEPS", 60)
    finding = found(audited.job(tmp_path, recipe=audited.CONVOLUTION))
    assert finding.setting.startswith("optimised attack on 10 updates")
    assert measure(finding, "one example: cosine").value > 0.98
    assert measure(finding, "right example named").value == 1.0
    assert finding.verdict == "leaks"


def test_tokens_are_left_to_the_attack_on_texts(tmp_path: Path) -> None:
    lines = [{"text": "ab" * (1 + i % 4), "label": str(i % 2)} for i in range(6)]
    data = {"train": {"s": rows(tmp_path / "texts.jsonl", lines)}, "labels": ["0", "1"]}
    values = {"recipe": "sequence-classification", "model": BERT, "data": data, "train": {}}
    with opened(audited.job(tmp_path, **values)) as subject:
        assert isinstance(inversion.attack(subject, np.random.default_rng(0), Silent()), Skipped)
