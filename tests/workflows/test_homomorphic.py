# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under homomorphic encryption: the model of a plain sum, whoever drops out when, and whatever is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toys
from hansa.core import config
from hansa.core.tree import leaves
from hansa.core.values import Absence
from hansa.errors import FitError, PrivacyError, QuorumError
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints
from hansa.workers import homomorphic, runner
from hansa.workflows import homomorphic as server
from tiny import LLAMA, rows

NOISE = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
METRICS = {"loss_sum": 1e6, "examples": 1e6}


def job(tmp_path: Path, encrypted: bool = True, **values):
    recipe = {"name": "toys:many", "num_sites": 5, **values.pop("recipe", {})}
    values = {"rounds": 2, "output": {"dir": str(tmp_path)}, **values}
    if encrypted:
        more = values.get("homomorphic_encryption", {})
        values["homomorphic_encryption"] = {"metrics": METRICS, "full_model": True, **more}
    return toys.job(recipe=recipe, **values)


def loaded(done):
    return Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load()


def final(done) -> np.ndarray:
    return np.array(loaded(done).model.params["w"])


@pytest.mark.parametrize(("engine", "strategy"), [("local", "fedadam"), ("local", "scaffold"), ("processes", "fedavg")])
def test_the_model_is_that_of_the_plain_sum(tmp_path, engine, strategy):
    values = {"engine": {"name": engine}, "strategy": strategy}
    plain = run(job(tmp_path / "plain", encrypted=False, **values))
    hidden = run(job(tmp_path / "hidden", **values))
    assert np.abs(final(hidden) - final(plain)).max() < 1e-5
    for mine, theirs in zip(hidden.records, plain.records, strict=True):
        assert mine["accepted"] == theirs["accepted"]
        assert mine["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-5)
        assert mine["metrics"]["train_loss"] == pytest.approx(theirs["metrics"]["train_loss"], rel=1e-5)
        assert mine["site_metrics"] == {}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A small language model's LoRA at three sites, as a job's values, and the run that sums in the open."""
    folder = tmp_path_factory.mktemp("tuned")
    texts = {site: rows(folder / f"{site}.jsonl", [{"text": f"ships of {site} sail. " * 4}] * 6) for site in "abc"}
    common = {
        "name": "lora",
        "rounds": 1,
        "recipe": {"name": "causal-lm", "max_length": 32},
        "model": {**LLAMA, "adapter": {"method": "lora", "r": 4}},
        "data": {"train": texts},
        "train": {"optimizer": "sgd", "lr": 0.5, "steps": 2, "batch_size": 2},
        "baselines": {"base": False, "local": False},
    }
    return common, run(config.parse({**common, "output": {"dir": str(folder)}}))


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_an_adapter_is_tuned_as_without(tmp_path, tuned, engine):
    """Sums of three are off by 3 · 1e-7 / 2, and over a weight above 0.3."""
    common, plain = tuned
    section = {"metrics": {"loss_sum": 1e6, "tokens": 1e6}, "range": 1.0, "step": 1e-7}
    more = {
        "engine": {"name": engine, "workers": 1},
        "output": {"dir": str(tmp_path)},
        "homomorphic_encryption": section,
    }
    hidden = run(config.parse({**common, **more}))
    params, others = (
        {name: np.asarray(leaf) for name, leaf in leaves(loaded(done).model.params).items()} for done in (plain, hidden)
    )
    assert max(np.abs(params[name] - others[name]).max() for name in params) < 2e-6
    moved = max(np.abs(values).max() for name, values in others.items() if "lora_B" in name)
    assert moved > 1e-3
    assert hidden.records[0]["metrics"]["loss"] == pytest.approx(plain.records[0]["metrics"]["loss"], rel=1e-4)


def exchanging(monkeypatch, change) -> None:
    """Have ``change(phase, answers)`` see every exchange's answers."""
    exchange = runner.SecureSites.exchange

    def changed(self, course, phase, letters):
        return change(phase, exchange(self, course, phase, letters))

    monkeypatch.setattr(runner.SecureSites, "exchange", changed)


@pytest.mark.parametrize("when", ["accept", "train"])
def test_sites_that_drop_out_are_left_out_of_the_sum(tmp_path, monkeypatch, when):
    gone = {"s01", "s03"}
    faults = {"faults": {f"{site}:1": "raise" for site in gone}}

    def drop(phase, answers):
        return {
            site: Absence(site, "lost", "gone") if phase == when and site in gone else answer
            for site, answer in answers.items()
        }

    exchanging(monkeypatch, drop)
    values = {"rounds": 1, "homomorphic_encryption": {"metrics": {}, "key_site": "s01"}, "cohort": {"quorum": 0.5}}
    done = run(job(tmp_path / "hidden", **values, recipe=faults if when == "train" else {}))
    plain = run(job(tmp_path / "plain", encrypted=False, rounds=1, cohort={"quorum": 0.5}, recipe=faults))
    assert done.records[0]["accepted"] == plain.records[0]["accepted"] == ["s00", "s02", "s04"]
    assert {absent["site"] for absent in done.records[0]["absent"]} == gone
    assert np.abs(final(done) - final(plain)).max() < 1e-5


@pytest.mark.parametrize("phase", ["offer", "open"])
def test_a_silent_key_site_is_named_and_the_round_goes_on_when_it_is_back(tmp_path, monkeypatch, phase):
    """What the others have sent is not opened, and stays good: nobody trains twice."""
    trained = tmp_path / "trained.txt"

    def drop(now, answers):
        return {site: Absence(site, "lost", "its line is cut") if now == phase else a for site, a in answers.items()}

    exchanging(monkeypatch, drop)
    values = {"rounds": 1, "homomorphic_encryption": {"metrics": {}, "key_site": "s02"}}
    asked = job(tmp_path / "hidden", recipe={"trained": str(trained)}, **values)
    with pytest.raises(QuorumError, match=r"s02, which has the key(.|\n)*its line is cut"):
        run(asked)
    monkeypatch.undo()
    done = run(asked, resume=True)
    assert np.abs(final(done) - final(run(job(tmp_path / "plain", encrypted=False, rounds=1)))).max() < 1e-5
    assert sorted(trained.read_text().split("\n")[:-1]) == [f"s{n:02d} 1" for n in range(5)]


def test_a_key_site_that_loses_its_folder_is_named_and_the_resumed_run_has_other_keys(tmp_path, monkeypatch):
    """What the others have sent can be read by nobody any more: they are asked again."""
    trained = tmp_path / "trained.txt"
    runs = tmp_path / "hidden"
    due = ["train", "evaluate"]

    def lose(phase, answers):
        (folder,) = runs.glob("*/work/secagg/toy")
        if due and phase == "accept" and (folder / "s02.opened").exists() == (due[0] == "evaluate"):
            del due[0]
            (folder / "s02.key").unlink()
        return answers

    exchanging(monkeypatch, lose)
    values = {"rounds": 1, "homomorphic_encryption": {"key_site": "s02"}}
    asked = job(runs, recipe={"trained": str(trained)}, **values)
    with pytest.raises(QuorumError, match=r"s02 has lost the keys of this round's sum.*Resume"):
        run(asked)
    with pytest.raises(QuorumError, match=r"s02 has lost the keys of this round's sum.*Resume"):
        run(asked, resume=True)
    done = run(asked, resume=True)
    assert not due
    assert sorted(trained.read_text().split("\n")[:-1]) == sorted([f"s{n:02d} 1" for n in range(5)] * 2)
    assert np.array_equal(final(done), final(run(job(tmp_path / "calm", **values))))


def test_a_key_site_that_is_not_drawn_opens_the_sum_all_the_same(tmp_path):
    """It takes part in every sum's protocol, and trains only when it is drawn."""
    trained = tmp_path / "trained.txt"
    values = {"rounds": 3, "cohort": {"sample": 3, "quorum": 3}}
    section = {"metrics": {}, "key_site": "s02"}
    done = run(job(tmp_path / "hidden", homomorphic_encryption=section, recipe={"trained": str(trained)}, **values))
    plain = run(job(tmp_path / "plain", encrypted=False, **values))
    drawn = [record["accepted"] for record in done.records]
    assert {"s02" in sites for sites in drawn} == {True, False}
    assert drawn == [record["accepted"] for record in plain.records]
    assert trained.read_text().count("s02 ") == sum("s02" in sites for sites in drawn)
    assert np.abs(final(done) - final(plain)).max() < 1e-5


def test_too_few_left_means_that_nothing_is_opened(tmp_path, monkeypatch):
    asked = []
    exchanging(monkeypatch, lambda phase, answers: asked.append(phase) or answers)
    faults = {"faults": {f"s{n:02d}:1": "raise" for n in range(3)}}
    with pytest.raises(QuorumError, match=r"2 of 5 sites sent ciphertexts(.|\n)*s00: lost"):
        run(job(tmp_path, rounds=1, recipe=faults))
    assert "open" not in asked


@pytest.mark.parametrize("change", ["short", "long", "no residues", "beside"])
def test_ciphertexts_that_are_none_are_rejected_by_name(tmp_path, monkeypatch, change):
    masked = homomorphic.Sessions.masked

    def broken(self, course, update, task):
        sent = masked(self, course, update, task)
        if update.site != "s03" or task != "train":
            return sent
        words = np.array(sent.parts[server.SEALED][server.CIPHERTEXTS])
        changed = {"short": words[:-1], "long": np.append(words, words), "no residues": words | np.uint64(1 << 63)}
        parts = {server.SEALED: {server.CIPHERTEXTS: changed.get(change, words)}}
        return type(sent)(**{**sent.__dict__, "parts": parts, "sums": {"loss_sum": 1.0} if change == "beside" else {}})

    monkeypatch.setattr(homomorphic.Sessions, "masked", broken)
    done = run(job(tmp_path, rounds=1))
    (absent,) = done.records[0]["absent"]
    assert (absent["site"], absent["kind"]) == ("s03", "rejected")


def test_the_server_gets_ciphertexts_only(tmp_path, monkeypatch):
    add, seen = server.Session._add, []

    def noted(self, total, reply):
        header = reply.header
        assert (header.weight, header.sums, header.logged) == (1.0, {}, {})
        seen.append(np.concatenate([chunk.values for chunk in reply.chunks()]))
        add(self, total, reply)

    monkeypatch.setattr(server.Session, "_add", noted)
    run(job(tmp_path, rounds=1, homomorphic_encryption={"metrics": {}}))
    assert len(seen) == 5
    assert len({values.tobytes() for values in seen}) == 5


@pytest.mark.parametrize(
    ("section", "kind", "reason"),
    [
        ({"max_bytes": 100_000}, FitError, r"is 131,072 bytes encrypted, .*s to encrypt"),
        ({"step": 1e-12}, PrivacyError, "Allow a coarser step"),
        ({"full_model": False}, FitError, "give model.adapter"),
        ({"range": 1e-6, "step": 1e-9}, QuorumError, "'w' of 'delta'"),
        ({"key_site": "nobody"}, FitError, "'nobody', which does not take part"),
    ],
)
def test_what_can_not_be_is_refused_before_or_at_the_sites(tmp_path, section, kind, reason):
    with pytest.raises(kind, match=reason):
        run(job(tmp_path, rounds=1, homomorphic_encryption={"metrics": {}, **section}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"secure_aggregation": {}}, "each makes a sum of its own kind"),
        ({"strategy": {"name": "fedavg", "robust": {"rule": "median", "malicious": 1}}}, "sees a sum only"),
        ({"workflow": "cyclic"}, "a whole model goes from site to site"),
        ({"cohort": {"late": "accept"}}, "late update"),
        ({"privacy": {"mechanism": "distributed", **NOISE}}, r"add \[secure_aggregation\]"),
        ({"privacy": {"mechanism": "central", **NOISE}}, "decrypts each sum before the server adds noise"),
    ],
)
def test_what_does_not_compose_is_refused(tmp_path, values, reason):
    with pytest.raises((FitError, PrivacyError), match=reason):
        run(job(tmp_path, **values))
