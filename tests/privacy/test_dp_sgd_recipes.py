# SPDX-License-Identifier: Apache-2.0
"""DP-SGD in every recipe: clipped sums against a loop over examples, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hansa.client.clipped import PROBES, Clipper
from hansa.core.config import parse
from hansa.errors import FitError, ModelError
from hansa.privacy.draws import KEY_BYTES, Secret
from hansa.privacy.plan import SLACK
from hansa.privacy.steps import NoisySteps
from hansa.runs.run import list_runs
from hansa.simulation.run import run
from tiny import BERT, LLAMA, VIT, plan, program, rows

LORA = {"method": "lora", "r": 4}
PRIVATE = {"mechanism": "dp-sgd", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
STILL = {**BERT, "config": {**BERT["config"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
GPT2: Mapping[str, Any] = {
    "config": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "summary_first_dropout": 0.0,
    },
    "tokenizer": "bytes",
}
LENGTH = 48


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Return the data of each recipe, of unequal lengths."""
    texts = [{"text": f"{'good' if i % 2 else 'bad'}{' very' * (i % 4)} {i}", "label": str(i % 2)} for i in range(12)]
    pairs = [{"prompt": "ab" * (1 + i % 3), "completion": "c" * (1 + i % 5)} for i in range(12)]
    chats = [
        {"messages": [{"role": "user", "content": "x" * (i % 3)}, {"role": "assistant", "content": "y" * (1 + i % 4)}]}
        for i in range(12)
    ]
    words = [f"Anna{i}\tB-PER\n" + "sings\tO\n" * (i % 4) for i in range(12)]
    (tmp_path / "names.conll").write_text("\n".join(words))
    for i in range(12):
        folder = tmp_path / "shades" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 200 * (i % 2) + i).save(folder / f"{i}.png")
    files = {
        "sequence-classification": {"train": {"s": rows(tmp_path / "texts.jsonl", texts)}, "labels": ["0", "1"]},
        "text": {"train": {"s": rows(tmp_path / "texts.jsonl", texts)}},
        "pair": {"train": {"s": rows(tmp_path / "pairs.jsonl", pairs)}, "columns": {"prompt": "prompt"}},
        "chat": {"train": {"s": rows(tmp_path / "chats.jsonl", chats)}, "columns": {"messages": "messages"}},
        "token-classification": {"train": {"s": str(tmp_path / "names.conll")}, "labels": ["PER"]},
        "image-classification": {"train": {"s": str(tmp_path / "shades")}, "labels": ["dark", "light"]},
    }
    return {kind: {**data, "test_fraction": 0} for kind, data in files.items()}


def built_of(kind: str, model: Mapping[str, Any], data: Mapping[str, Any], **more: Any) -> Any:
    recipe: Any = {"name": "causal-lm", "max_length": LENGTH} if kind in ("text", "pair", "chat") else kind
    train = {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "steps": 3, **more.pop("train", {})}
    return program(recipe, model, data, privacy=PRIVATE, train=train, **more)


def looped(built: Any, examples: Any, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """Return the clipped sum by the recipe's own training loss of one example at a time, and the norms."""
    tuned = built._tuned
    total = {name: torch.zeros_like(tensor) for name, tensor in tuned.trainable.items()}
    norms = []
    for example in examples:
        tuned.model.zero_grad()
        built._task.loss(tuned.model, built._batch([example]))[0].backward()
        grads = {name: tensor.grad for name, tensor in tuned.trainable.items() if tensor.grad is not None}
        norms.append(float(torch.cat([g.ravel() for g in grads.values()]).norm()))
        for name, g in grads.items():
            total[name] += g * min(1.0, clip / norms[-1])
    tuned.model.zero_grad()
    return total, norms


CASES = [
    ("sequence-classification", LLAMA, LORA, True),
    ("sequence-classification", STILL, LORA, True),
    ("sequence-classification", STILL, None, True),
    ("sequence-classification", LLAMA, None, True),
    ("sequence-classification", LLAMA, {**LORA, "use_dora": True}, False),
    ("token-classification", STILL, LORA, True),
    ("image-classification", VIT, {**LORA, "target_modules": "all-linear"}, True),
    ("image-classification", VIT, None, False),
    ("text", LLAMA, LORA, True),
    ("pair", LLAMA, LORA, True),
    ("chat", LLAMA, LORA, True),
    ("text", LLAMA, None, True),
    ("text", GPT2, LORA, True),
    ("text", GPT2, None, False),
]


@pytest.mark.parametrize(
    ("kind", "model", "adapter", "ghost"),
    CASES,
    ids=[f"{k}-{m['config']['model_type']}-{'dora' if a and 'use_dora' in a else 'lora' if a else 'full'}"
         for k, m, a, _ in CASES],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_clipped_sum_is_that_of_a_loop_over_examples(
    kind: str, model: Mapping[str, Any], adapter: Any, ghost: bool, given: dict[str, Any]
) -> None:
    built = built_of(kind, {**model, "adapter": adapter}, given[kind])
    examples = list(built._examples("s").train)
    tuned = built._tuned
    with torch.no_grad():  # LoRA's B starts at zero, and A has no gradient then
        for tensor in tuned.trainable.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    tuned.model.train()
    _, norms = looped(built, examples, 1.0)
    clip = float(np.median(norms))
    expected, _ = looped(built, examples, clip / SLACK if ghost else clip)
    clipper = Clipper(tuned.model, tuned.trainable, built._task.losses)
    with clipper.ready(lambda: built._batch(examples[:PROBES])) as sums:
        found = sums(built._batch(examples), clip)
    assert clipper.ghost is ghost
    assert found.keys() == expected.keys()
    scale = max(float(leaf.abs().max()) for leaf in expected.values())
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_training_is_the_optimiser_on_clipped_sums_over_the_batches_drawn(
    adapter: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, against a loop by hand; batches are larger than what is computed at once."""
    built = built_of("sequence-classification", {**STILL, "adapter": adapter}, given["sequence-classification"])
    start = built.initial()
    made: list[NoisySteps] = []

    def quiet(count: int) -> NoisySteps:
        drawn = noisy(count)
        silent = drawn.terms.section.model_copy(update={"noise_multiplier": 0.0})
        made.append(NoisySteps(type(drawn.terms)(silent, 3, 0.8), count, 3, Secret(bytes(KEY_BYTES))))
        return made[-1]

    noisy = built._noisy
    monkeypatch.setattr(built, "_noisy", quiet)
    work = built.train("s", plan(start), None)
    assert (work.num_examples, dict(work.sums), work.steps.count) == (12, {}, 3)
    built._tuned.set(start)
    built._tuned.model.train()
    examples = built._examples("s").train
    for batch in made[0].batches():
        assert len(batch) > 4, "several pieces"
        total, _ = looped(built, [examples[i] for i in batch], PRIVATE["clip"] / SLACK)
        with torch.no_grad():
            for name, tensor in built._tuned.trainable.items():
                tensor -= 0.1 * total[name] / (0.8 * 12)
    for name, tensor in built._tuned.trainable.items():
        np.testing.assert_allclose(work.params[name], tensor.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", [None, {**LORA, "lora_dropout": 0.3}], ids=["full", "lora"])
def test_with_dropout_an_example_is_clipped_by_its_own_norm(adapter: Any, given: dict[str, Any]) -> None:
    """One example's clipped gradient is as long as the clip: its norm was taken under the masks it was made with."""
    built = built_of("sequence-classification", {**BERT, "adapter": adapter}, given["sequence-classification"])
    examples, tuned = built._examples("s").train, built._tuned
    clipper = Clipper(tuned.model, tuned.trainable, built._task.losses)
    clip = 0.02
    with clipper.ready(lambda: built._batch(examples[:PROBES])) as sums:
        assert clipper.ghost
        tuned.model.train()
        seen = []
        for example in [*examples, *examples]:
            one = sums(built._batch([example]), clip)
            seen.append(float(torch.cat([leaf.ravel() for leaf in one.values()]).norm()))
        pair = [sums(built._batch([examples[0]]), 1e6) for _ in range(2)]
    np.testing.assert_allclose(seen, clip / SLACK, rtol=1e-4)
    name = next(iter(tuned.trainable)) if adapter is None else "classifier.weight"
    assert not torch.equal(pair[0][name], pair[1][name]), "dropout is on"


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_model_with_dropout_learns(tmp_path: Path, adapter: Any) -> None:
    items = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(60)]
    data = {"train": {"s": rows(tmp_path / "x.jsonl", items)}, "labels": ["0", "1"]}
    weak = {**PRIVATE, "noise_multiplier": 0.1}
    train = {"lr": 2e-2, "steps": 40, "batch_size": 12}
    built = program("sequence-classification", {**BERT, "adapter": adapter}, data, privacy=weak, train=train)
    start = built.initial()
    before = built.summarise(built.evaluate("s", plan(start)))
    work = built.train("s", plan(start), None)
    assert built._tuned.clipper.ghost
    after = built.summarise(built.evaluate("s", plan(work.params)))
    assert after["loss"] < 0.7 * before["loss"]


def test_texts_are_not_joined_and_n_counts_what_is_trained_on(tmp_path: Path) -> None:
    items = [{"text": "x" * length} for length in (1, 500, 20, 0, 3)]
    data = {"train": {"s": rows(tmp_path / "x.jsonl", items)}, "test_fraction": 0}
    built = built_of("text", LLAMA, data)
    assert [len(example.ids) for example in built._examples("s").train] == [1, LENGTH, 20, 3]
    assert built.inspect("s").counts == {"train": 4, "test": 0}
    assert built.train("s", plan(built.initial()), None).num_examples == 4
    open_one = program({"name": "causal-lm", "max_length": LENGTH}, LLAMA, data)
    assert len(open_one._examples("s").train) == 11, "blocks of 48 tokens, otherwise"
    assert open_one.inspect("s").counts == {"train": 5, "test": 0}


def _count(model: Any, args: Any) -> None:
    model.seen.add_(1)


def test_only_what_was_noised_leaves(given: dict[str, Any]) -> None:
    """A buffer that a forward pass changes would tell of the data."""
    built = built_of("sequence-classification", STILL, given["sequence-classification"])
    tuned = built._tuned
    tuned.model.register_buffer("seen", torch.zeros(1))
    tuned.shared["seen"] = tuned.model.seen
    tuned.model.register_forward_pre_hook(_count)
    start = built.initial()
    work = built.train("s", plan(start), None)
    assert float(tuned.model.seen) > 0
    assert work.params["seen"].tolist() == [0.0]
    assert all(not np.array_equal(work.params[name], start[name]) for name in tuned.trainable)


def test_half_precision_and_batch_normalisation_are_refused(given: dict[str, Any]) -> None:
    half = built_of("sequence-classification", {**LLAMA, "dtype": "bfloat16"}, given["sequence-classification"])
    with pytest.raises(ModelError, match="dp-sgd trains float32 only"):
        half.train("s", plan(half.initial()), None)
    mobile = {"config": {"model_type": "mobilenet_v1", "image_size": 32, "num_channels": 1, "depth_multiplier": 0.1}}
    mixing = built_of("image-classification", mobile, given["image-classification"])
    with pytest.raises(ModelError, match=r"Layer '.*normalization' \(BatchNorm2d\)"):
        mixing.train("s", plan(mixing.initial()), None)


# --- whole runs


def job(folder: Path, **more: Any) -> Any:
    drawn = np.random.default_rng(0)
    for name, count in (("a", 120), ("b", 300)):
        x = drawn.normal(size=(count, 4))
        np.savez(folder / f"{name}.npz", features=x, label=np.where(x[:, 0] > 0, "1", "0"))
    values: dict[str, Any] = {
        "name": "hidden",
        "rounds": 3,
        "recipe": {"name": "tabular-classification", "inputs": 4, "hidden": [8]},
        "data": {"train": {s: str(folder / f"{s}.npz") for s in "ab"}, "labels": ["0", "1"], "test_fraction": 0.2},
        "train": {"optimizer": "sgd", "lr": 0.5, "batch_size": 24, "steps": 4},
        "privacy": {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 2.0, "delta": 1e-4, "accountant": "rdp"},
        "baselines": {"local": False},
        "output": {"dir": str(folder / "runs")},
        **more,
    }
    return parse(values)


@pytest.mark.parametrize(
    ("engine", "strategy"), [("local", "fedavg"), ("local", "fedprox"), ("local", "scaffold"), ("processes", "fedavg")]
)
def test_a_federation_trains_under_it_and_tells_no_training_metrics(tmp_path: Path, engine: str, strategy: str) -> None:
    finished = run(job(tmp_path, strategy=strategy, engine={"name": engine, "workers": 1}))
    report = json.loads((finished.directory / "report.json").read_text())
    assert len(report["rounds"]) == 3
    for record in report["rounds"]:
        told = {name for metrics in (record["metrics"], *record["site_metrics"].values()) for name in metrics}
        assert {name for name in told if name.startswith("train_")} <= {"train_seconds"}
        assert record["metrics"]["accuracy"] > 0
    shown = report["privacy"]
    assert (shown["mechanism"], shown["noise_multiplier"]) == ("dp-sgd", 2.0)
    assert "96 examples" in shown["sampling"], "the smallest site's: its epsilon is the largest"


def test_the_same_job_twice_is_not_the_same_run(tmp_path: Path) -> None:
    asked = job(tmp_path)
    one, two = run(asked), run(asked)
    assert len(list_runs(tmp_path / "runs")) == 2
    found = [(each.directory / "model" / "model.safetensors").read_bytes() for each in (one, two)]
    assert found[0] != found[1], "whoever knows the seed does not know the noise"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"train": {"clip_grad": 1.0}}, "leave out train.clip_grad"),
        ({"engine": {"name": "batched"}}, "use engine 'local' or 'processes'"),
        ({"baselines": {"local": True}}, "set baselines.local"),
    ],
    ids=["clip_grad", "batched", "baselines"],
)
def test_a_job_that_does_not_fit_is_refused_before_it_trains(tmp_path: Path, more: Any, reason: str) -> None:
    with pytest.raises(FitError, match=reason):
        run(job(tmp_path, **more))


def test_a_script_that_makes_its_own_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    asked = job(
        tmp_path,
        recipe={"name": "script", "path": str(tmp_path / "train.py"), "sites": 2},
        data=None,
        model={"factory": "train.py:Net"},
    )
    with pytest.raises(FitError, match="no bound can be put on what one example does"):
        run(asked)
