# SPDX-License-Identifier: Apache-2.0
"""``hansa audit privacy`` through the command line: what holds, what is broken, what does not apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from audits import job as tabular
from hansa.client import clipped
from hansa.errors import AuditError
from hansa.privacy.draws import Secret
from shell import Result, hansa
from tiny import rows

NOISED = {"mechanism": "central", "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-5}


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what audits a job over three small sites, with canaries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hansa.audit.canaries.CANARIES", 800)
    monkeypatch.setattr("hansa.audit.estimate.SURE", 1 - 1e-9)  # noise is fresh, and 99.9 % would fail now and then

    def call(*words: str, **job: Any) -> Result:
        recipe = {"name": "tabular-classification", "inputs": 4, "hidden": [160]}
        values = tabular(tmp_path, **{"rounds": 1, "recipe": recipe, **job}).model_dump(mode="json")
        (tmp_path / "job.json").write_text(json.dumps(values))
        return hansa(capsys, monkeypatch, "audit", "privacy", "job.json", "--attack", "canaries", *words)

    return call


def weakened(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Divide all Gaussian noise."""
    true = Secret.gaussian

    def gaussian(self: Any, shape: Any, dtype: Any, std: float, *labels: Any) -> Any:
        return true(self, shape, dtype, std / times, *labels)

    monkeypatch.setattr(Secret, "gaussian", gaussian)


def test_a_sound_mechanism_holds_and_is_reported(audit: Any, tmp_path: Path) -> None:
    done = audit(privacy=NOISED)
    assert done.code == 0
    assert "ε proved" in done.out
    found = json.loads((tmp_path / "runs" / "audited-audit" / "audit.json").read_text())
    (finding,) = found["findings"]
    proved, normal, suggested, _ = finding["measures"]
    assert found["verdict"] == finding["verdict"] == "holds"
    assert proved["bound"] == found["privacy"]["claims"][0]["epsilon"] == pytest.approx(1.993, abs=1e-3)
    assert 0 <= proved["value"] < proved["bound"]
    assert 0 <= normal["value"] < normal["bound"] == proved["bound"]
    assert 0.3 < suggested["value"] < 4, "the best guess is of the right size, within 5.7 of its deviations"
    assert suggested["low"] < suggested["value"] < suggested["high"]
    assert f"(95 %: {suggested['low']:.2f} to {suggested['high']:.2f})" in finding["says"]
    assert "95 % interval" in done.out
    page = (tmp_path / "runs" / "audited-audit" / "audit.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page, "it opens without a network"
    assert finding["says"] in page.replace("&#39;", "'")


@pytest.mark.parametrize(
    "plan",
    [
        {"mechanism": "central", "clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-5},
        {"mechanism": "local", "clip": 0.5, "noise_multiplier": 3.0, "delta": 1e-5},
        {"mechanism": "dp-ftrl", "clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-5, "separation": 2},
    ],
    ids=lambda plan: plan["mechanism"],
)
def test_an_eighth_of_the_noise_breaks_the_promise(
    audit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: dict[str, Any]
) -> None:
    weakened(monkeypatch, 8)
    done = audit("--out", "found", privacy=plan, rounds=2 if plan["mechanism"] == "dp-ftrl" else 1)
    assert done.code == AuditError.exit_code == 13
    assert "A privacy promise is broken" in done.err
    found = json.loads((tmp_path / "found" / "audit.json").read_text())
    assert found["verdict"] == "fails"
    assert found["findings"][0]["measures"][0]["value"] > found["findings"][0]["measures"][0]["bound"]


def test_half_of_the_noise_breaks_the_promise_of_a_large_epsilon(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weakened(monkeypatch, 2)
    done = audit("--json", privacy={**NOISED, "noise_multiplier": 0.6})
    assert done.code == AuditError.exit_code
    assert "if noise is normal" in done.json["error"]["message"]
    assert "one-run canaries: ε proved " not in done.json["error"]["message"], "whatever the noise is, it is no proof"


def test_an_update_that_is_not_clipped_breaks_the_promise(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hansa.core.bound.clip", lambda parts, clip: (parts, 0.0))
    local = {"mechanism": "local", "clip": 0.5, "noise_multiplier": 4.0, "delta": 1e-5}
    assert audit("--json", privacy=local).json["error"]["kind"] == "AuditError"


@pytest.mark.parametrize("broken", [False, True], ids=["clipped", "not clipped"])
def test_gradients_of_dp_sgd(audit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool) -> None:
    if broken:
        monkeypatch.setattr(clipped, "_factors", lambda norms, clip: torch.ones_like(norms))
    lines = [{"features": [float(i % 7), 1.0, 0.5, float(i % 3)], "label": str(i % 2)} for i in range(1000)]
    plan = {"mechanism": "dp-sgd", "clip": 0.5, "noise_multiplier": 4.0, "delta": 1e-5, "accountant": "rdp"}
    done = audit(
        privacy=plan,
        data={"train": {"a": rows(tmp_path / "many.jsonl", lines)}, "labels": ["0", "1"]},
        train={"steps": 5, "batch_size": 500, "lr": 0.1, "optimizer": "sgd"},
    )
    assert done.code == (13 if broken else 0), done.err


def test_what_does_not_apply_says_why(audit: Any) -> None:
    found = audit("--json").json
    assert (found["verdict"], found["findings"]) == (None, [])
    assert found["skipped"][0]["because"] == "The job promises no ε that canaries could disprove."


def test_secret_cohorts_are_held_against_both_claims(audit: Any) -> None:
    found = audit("--json", privacy=NOISED, rounds=3, cohort={"sample": 0.5}).json
    measures = {measure["name"]: measure for measure in found["findings"][0]["measures"]}
    claims = {claim["adversary"]: claim["epsilon"] for claim in found["privacy"]["claims"]}
    assert measures["ε proved, public"]["bound"] == claims["the public"]
    assert measures["ε proved, sites"]["bound"] == claims["the sites"] > claims["the public"]


def test_a_finished_run_is_audited_as_it_was(
    audit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    audit(privacy=NOISED)
    assert hansa(capsys, monkeypatch, "run", "job.json").code == 0
    words = ("audit", "privacy", "audited-0001", "--attack", "canaries")
    done = hansa(capsys, monkeypatch, *words, "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == "audited-0001"
    assert Path(done.json["files"]["report"]) == tmp_path / "runs" / "audited-0001" / "audit" / "audit.html"
    refused = hansa(capsys, monkeypatch, *words, "--set", "rounds=2")
    assert refused.code == 2
    assert "a run is audited as it was" in refused.err


def test_an_unknown_attack_is_named(audit: Any) -> None:
    done = audit("--attack", "canary")
    assert done.code == 2
    assert "Did you mean 'canaries'?" in done.err
