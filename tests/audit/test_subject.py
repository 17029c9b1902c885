# SPDX-License-Identifier: Apache-2.0
"""What attacks are shown is what runs: the same model, the same updates, the same sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audits import job
from hansa.audit.subject import Transparent, opened
from hansa.core.config import Job, parse
from hansa.core.storage import load_tree
from hansa.errors import FitError, JobError
from hansa.privacy.plan import SLACK
from hansa.simulation.run import run
from hansa.workflows.secure import MASKED, VECTOR
from tiny import BERT, rows, same

PRIVATE = {"mechanism": "central", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}


def texts(folder: Path) -> Job:
    lines = [{"text": "ab" * (1 + i % 4), "label": str(i % 2)} for i in range(6)]
    return parse(
        {
            "name": "texts",
            "recipe": "sequence-classification",
            "model": BERT,
            "data": {"train": {"s": rows(folder / "texts.jsonl", lines)}, "labels": ["0", "1"]},
        }
    )


def test_the_model_is_that_of_the_run(tmp_path: Path) -> None:
    plain = job(tmp_path)
    finished = run(plain)
    updates, sums = [], {}
    with opened(plain) as subject:
        reached = subject.carry_out(
            seen=updates.append, released=lambda number, found: sums.update({number: found.sums["delta"]})
        )
    last = load_tree(finished.directory / "checkpoints" / "000002" / "model.safetensors")
    assert same(reached, {name: np.asarray(leaf) for name, leaf in last.items()})
    assert [(u.site, u.round) for u in updates] == [(site, number) for number in (1, 2) for site in "abc"]
    assert sums.keys() == {1, 2}
    total = sum(np.asarray(u.parts["delta"]["0.weight"], np.float64) for u in updates[:3])
    assert np.allclose(np.asarray(sums[1]["0.weight"]), total, atol=1e-6)


def test_what_a_deployment_would_mask_by_default_is_attacked_masked(tmp_path: Path) -> None:
    silent = job(tmp_path, secure_aggregation=None)
    updates: list[Any] = []
    with opened(silent) as subject:
        assert subject.protection == "masked"
        reached = subject.carry_out(seen=updates.append)
    assert {part for update in updates for part in update.parts} == {MASKED}
    last = load_tree(run(silent).directory / "checkpoints" / "000002" / "model.safetensors")
    assert same(reached, {name: np.asarray(leaf) for name, leaf in last.items()})


def test_a_run_s_final_model_is_attacked(tmp_path: Path) -> None:
    finished = run(job(tmp_path))
    with opened(finished.job, finished) as subject:
        assert same(subject.params, load_tree(finished.directory / "model" / "model.safetensors"))


def test_an_unfinished_run_has_no_model(tmp_path: Path) -> None:
    from hansa.runs.run import Run, create

    begun = job(tmp_path)
    with pytest.raises(JobError, match="is not finished"), opened(begun, Run(create(begun))):
        pass


def test_updates_are_clipped_and_sums_are_noised(tmp_path: Path) -> None:
    updates, released = [], []
    with opened(job(tmp_path, privacy=PRIVATE)) as subject:
        subject.carry_out(rounds=1, seen=updates.append, released=lambda number, found: released.append(found))
        assert subject.protection == "central, clip 0.5, noise 1"
        assert subject.promised("the server") is None
        assert subject.promised("the public") == subject.plan.claims[0].epsilon
    norms = [np.sqrt(sum((np.asarray(t) ** 2).sum() for t in u.parts["delta"].values())) for u in updates]
    assert max(norms) <= 0.5 * SLACK
    difference = np.concatenate(
        [
            (np.asarray(leaf, float) - sum(np.asarray(u.parts["delta"][name], float) for u in updates)).ravel()
            for name, leaf in released[0].sums["delta"].items()
        ]
    )
    assert 0.2 < difference.std() < 0.9, "the noise of 0.5 is in what is released"


def test_the_server_sees_masked_vectors_only(tmp_path: Path) -> None:
    updates, released = [], []
    with opened(job(tmp_path, secure_aggregation={"minimum": 3})) as subject:
        subject.carry_out(rounds=1, seen=updates.append, released=lambda number, found: released.append(found))
    assert len(updates) == 3
    assert all(list(u.parts) == [MASKED] and list(u.parts[MASKED]) == [VECTOR] for u in updates)
    assert set(released[0].sums) == {"delta"}


@pytest.mark.parametrize("kind", [job, texts])
def test_examples_can_be_told_apart(tmp_path: Path, kind: Any) -> None:
    with opened(kind(tmp_path)) as subject:
        program, site = subject.program, subject.sites[0]
        assert isinstance(program, Transparent)
        count = program.count(site)
        every = np.arange(count)
        assert {len(array) for array in program.batch(site, every).values()} == {count}
        losses = program.losses(subject.params, site, every)
        assert losses.shape == (count,)
        assert np.allclose(program.losses(subject.params, site, every[2:5]), losses[2:5], atol=1e-5)
        fewer = program.holding({site: every[2:5]})
        assert fewer.count(site) == 3
        assert np.allclose(fewer.losses(subject.params, site, np.arange(3)), losses[2:5], atol=1e-5)
        assert program.count(site) == count, "the program itself stays as it was"


def test_what_can_t_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError), opened(job(tmp_path, strategy="scaffold", privacy=PRIVATE)):
        pass


def test_settings_can_be_changed(tmp_path: Path) -> None:
    with opened(job(tmp_path)) as subject:
        other = subject.changed("train.epochs=0.25")
        assert (other.job.train.epochs, subject.job.train.epochs) == (0.25, 1.0)
        assert same(other.params, subject.params)
        assert json.loads(other.job.to_json()).keys() == json.loads(subject.job.to_json()).keys()
