# SPDX-License-Identifier: Apache-2.0
"""Language models: what carries a loss, losses against transformers' own, purity, export, adapters."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE, Correction
from hansa.core.values import Model
from hansa.errors import DataError, JobError, ModelError, NonFiniteError, StorageError
from hansa.recipes.batching import IGNORED
from hansa.recipes.finetune import FineTune
from hansa.recipes.tokenizers import byte_level
from tiny import LLAMA, plan, program, rows, same, score

TEXTS = ["the cat sat on the mat. " * 3, "a dog ran far away. " * 4, "ships sail to Lübeck. " * 3] * 4
RECIPE = {"name": "causal-lm", "max_length": 32}
SGD = {"optimizer": "sgd", "lr": 0.5, "steps": 4, "batch_size": 4}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    return {"train": {"a": rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])}}


def examples(built: Any, site: str) -> Any:
    return built._examples(site)


def test_packed_blocks_train_every_token_of_the_stream_but_the_first(texts: dict[str, Any]) -> None:
    built: Any = program(RECIPE, LLAMA, {**texts, "test_fraction": 0})
    tokenizer = byte_level()
    stream = [token for text in TEXTS for token in [*text.encode(), tokenizer.eos_token_id]]
    found = examples(built, "a").train
    assert [int(t) for each in found for t in each.targets] == stream[1:]
    assert [int(i) for each in found for i in each.ids] == stream[:-1]
    assert {len(each.ids) for each in found[:-1]} == {32}
    assert built.train("a", plan(built.initial()), None).num_examples == len(stream) - 1


def test_loss_is_the_one_transformers_computes(texts: dict[str, Any]) -> None:
    built: Any = program(RECIPE, LLAMA, texts)
    params = built.initial()
    model = built._tuned.model.eval()
    total = count = 0.0
    for example in examples(built, "a").test:
        whole = torch.from_numpy(np.append(example.ids, example.targets[-1]))[None]
        with torch.no_grad():
            total += float(model(input_ids=whole, labels=whole).loss) * (whole.shape[1] - 1)
        count += whole.shape[1] - 1
    metrics = score(built, params, "a")
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert 0 <= metrics["accuracy"] <= 1


def test_training_is_a_pure_function_of_plan_and_site(texts: dict[str, Any]) -> None:
    dropout = {**LLAMA, "config": {**LLAMA["config"], "attention_dropout": 0.3}}
    built = program(RECIPE, dropout, texts, train=SGD)
    again = program(RECIPE, dropout, texts, train=SGD)
    start = built.initial()
    assert same(start, again.initial())
    first = built.train("a", plan(start), None)
    kept = {name: leaf.copy() for name, leaf in first.params.items()}
    second = built.train("a", plan(start, round=2), None)
    torch.rand(5)
    score(built, second.params, "a")
    assert same(first.params, kept), "a later call must not write to what an earlier one returned"
    assert same(built.train("a", plan(start), None).params, kept)
    assert same(again.train("a", plan(start), None).params, kept)
    assert not same(second.params, kept)
    assert not same(built.train("a", plan(start, seed=1), None).params, kept)
    assert same(built.initial(), start)


def test_training_learns(texts: dict[str, Any]) -> None:
    built = program(RECIPE, LLAMA, texts, train={"lr": 1e-2, "steps": 40, "batch_size": 8})
    start = built.initial()
    before = score(built, start, "a")["loss"]
    work = built.train("a", plan(start), None)
    assert before == pytest.approx(math.log(259), rel=0.05)
    assert score(built, work.params, "a")["loss"] < 0.6 * before
    assert built.summarise(work.sums)["loss"] < before


def test_sgd_equals_a_plain_torch_loop(texts: dict[str, Any]) -> None:
    built: Any = program(RECIPE, LLAMA, texts, train={**SGD, "epochs": 1, "steps": None})
    work = built.train("a", plan(built.initial()), None)
    built.initial()
    fresh: Any = program(RECIPE, LLAMA, texts, train=SGD)
    model = fresh._tuned.model.train()
    from hansa.client.batches import shuffled

    data = examples(fresh, "a").train
    order = shuffled(len(data), 4, 0, "order", 1, "a")
    for _ in range(work.steps.count):
        batch = fresh._task.batch([data[i] for i in next(order)], fresh._processor)
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)
        loss.backward()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor -= 0.5 * tensor.grad
    assert work.steps.count == math.ceil(len(data) / 4)
    for name, tensor in model.named_parameters():
        np.testing.assert_allclose(work.params[name], tensor.detach().numpy(), atol=1e-6)


def test_a_strategy_s_correction_changes_every_step(texts: dict[str, Any]) -> None:
    built = program(RECIPE, LLAMA, texts, train=SGD)
    start = built.initial()
    plain = built.train("a", plan(start), None)
    still = Correction({}, lambda context, params, grads: {name: g * 0 for name, g in grads.items()})
    assert same(built.train("a", plan(start), still).params, start)
    assert not same(plain.params, start)


def test_all_sites_together(tmp_path: Path) -> None:
    train = {site: rows(tmp_path / f"{site}.jsonl", [{"text": t} for t in TEXTS[:5]]) for site in "ab"}
    built: Any = program(RECIPE, LLAMA, {"train": train}, train=SGD)
    work = built.train(EVERYONE, plan(built.initial()), None)
    assert work.num_examples == sum(built._task.num_trained(examples(built, site).train) for site in built.sites)


def test_prompt_and_completion_train_the_completion_only(tmp_path: Path) -> None:
    path = rows(tmp_path / "x.jsonl", [{"q": "2+2?", "a": "4"}, {"q": "Far away " * 9, "a": "cut off"}])
    data = {"train": {"s": path}, "test_fraction": 0, "columns": {"prompt": "q", "completion": "a"}}
    built: Any = program(RECIPE, LLAMA, data)
    found = examples(built, "s").train
    assert len(found) == 1, "an example whose completion is cut off teaches nothing"
    tokenizer = byte_level()
    assert tokenizer.decode(found[0].ids) == "2+2?\n4"
    assert found[0].targets.tolist() == [*[IGNORED] * 4, ord("4"), tokenizer.eos_token_id]


def test_chats_train_what_the_assistant_says(tmp_path: Path) -> None:
    messages = [("user", "Hi"), ("assistant", "Ahoy"), ("user", "Bye"), ("assistant", "Aye")]
    chat = [{"role": role, "content": content} for role, content in messages]
    data = {"train": {"s": rows(tmp_path / "x.jsonl", [{"m": chat}])}, "test_fraction": 0, "columns": {"messages": "m"}}
    built: Any = program({"name": "causal-lm", "max_length": 100}, LLAMA, data)
    (found,) = examples(built, "s").train
    tokenizer = byte_level()
    whole = [*found.ids.tolist(), found.targets[-1]]
    text = "<bos>User: Hi\nAssistant: Ahoy<eos>\nUser: Bye\nAssistant: Aye<eos>\n"
    assert tokenizer.decode(whole) == text
    assert tokenizer.decode(found.targets[found.targets != IGNORED]) == "Ahoy<eos>\nAye<eos>\n"


def test_padding_does_not_change_the_loss(tmp_path: Path) -> None:
    items = [{"p": "a" * n, "c": "b" * (9 - n)} for n in range(1, 9)] + [{"p": "x", "c": "y" * 20}]
    data = {"train": {"s": rows(tmp_path / "x.jsonl", items)}, "columns": {"prompt": "p", "completion": "c"}}
    losses = []
    for size in (1, 9):
        built = program(RECIPE, LLAMA, {**data, "test_fraction": 0.8}, train={"eval_batch_size": size})
        losses.append(score(built, built.initial(), "s")["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


ADAPTERS = [
    {"method": "lora", "r": 4},
    {"method": "lora", "use_dora": True},
    {"method": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"method": "loha"},
    {"method": "prompt_tuning", "num_virtual_tokens": 4},
    {"method": "prefix_tuning", "num_virtual_tokens": 4},
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: "-".join(map(str, a))[:20] + a["method"])
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_trains_and_is_exported(texts: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]) -> None:
    built: Any = program(RECIPE, {**LLAMA, "adapter": adapter}, texts, train={"lr": 1e-2, "steps": 5})
    start = built.initial()
    assert not any("base_model" in name or "default" in name for name in start)
    work = built.train("a", plan(start), None)
    assert not same(work.params, start)
    assert sum(leaf.size for leaf in start.values()) < 20_000
    expected = score(built, work.params, "a")["loss"]
    assert expected < score(built, start, "a")["loss"]
    out = tmp_path / "out"
    built.export(work.params, out)
    assert same(built.train("a", plan(start), None).params, work.params), "exporting must not touch the warm model"
    assert peft.PeftConfig.from_pretrained(out / "adapter").peft_type.value.lower() == adapter["method"]
    if "num_virtual_tokens" in adapter:
        assert not (out / "model").exists()
    else:
        merged = program(RECIPE, {"base": str(out / "model")}, texts)
        assert score(merged, merged.initial(), "a")["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_full_model_is_exported_as_transformers_reads_it(texts: dict[str, Any], tmp_path: Path) -> None:
    tied = {**LLAMA, "config": {**LLAMA["config"], "tie_word_embeddings": True}}
    built = program(RECIPE, tied, texts, train=SGD)
    start = built.initial()
    assert "model.embed_tokens.weight" in start
    assert "lm_head.weight" not in start, "a tied tensor appears once"
    assert not any("inv_freq" in name for name in start), "derived buffers are not shared"
    work = built.train("a", plan(start), None)
    built.export(work.params, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in model.named_parameters():
        assert tensor.detach().numpy().tobytes() == work.params[name].tobytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("Lübeck 😀\n")["input_ids"]) == "Lübeck 😀\n"


def test_bfloat16_models_are_shared_in_their_own_dtype(texts: dict[str, Any], tmp_path: Path) -> None:
    built = program(RECIPE, {**LLAMA, "dtype": "bfloat16"}, texts, train=SGD)
    start = built.initial()
    assert {leaf.dtype.name for leaf in start.values()} == {"bfloat16"}
    native = Model.start(start).native()
    assert same(built.train("a", plan(native), None).params, built.train("a", plan(start), None).params)
    built.export(start, tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_the_pretrained_stories_model_reads_stories_better_than_noise(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    base = {"base": str(shared_data("stories260k-llama")), "adapter": {"method": "lora", "r": 4}}
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."
    stories, noise = [{"text": story}] * 6, [{"text": story[::-1]}] * 6
    train = {"story": rows(tmp_path / "s.jsonl", stories), "noise": rows(tmp_path / "n.jsonl", noise)}
    prompts = {**RECIPE, "prompts": ["Once upon a time"], "max_new_tokens": 5}
    built = program(prompts, base, {"train": train}, train={"lr": 1e-2, "steps": 10})
    start = built.initial()
    assert score(built, start, "story")["perplexity"] < 10 < 100 < score(built, start, "noise")["perplexity"]
    assert built.show(start) == {"Once upon a time": ", there was a little"}
    drawn = program({**prompts, "temperature": 1.5}, base, {"train": train})
    assert drawn.show(start) == drawn.show(start) != built.show(start)
    work = built.train("noise", plan(start), None)
    assert score(built, work.params, "noise")["loss"] < score(built, start, "noise")["loss"]


def test_a_site_reports_counts_before_training(texts: dict[str, Any]) -> None:
    report = program(RECIPE, LLAMA, texts).inspect("a")
    assert report.counts == {"train": 10, "test": 2}


@pytest.mark.parametrize(
    ("train", "adaptive"),
    [({"optimizer": "adamw"}, True), ({"optimizer": "sgd"}, False), ({**SGD, "momentum": 0.9}, True)],
)
def test_traits_tell_plain_steps_from_adaptive_ones(texts: dict[str, Any], train: Any, adaptive: bool) -> None:
    traits = program(RECIPE, LLAMA, texts, train=train).traits
    assert Trait.STEPWISE in traits
    assert (Trait.ADAPTIVE_STEPS in traits) is adaptive
    assert Trait.TIMED not in traits
    assert Trait.TIMED in program(RECIPE, LLAMA, texts, train={**train, "max_seconds": 1}).traits


def test_data_are_checked_by_line_before_training(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    path = rows(tmp_path / "x.jsonl", [{"text": "x", "messages": chat}, {"text": 3}])
    for columns, line in (({}, 2), ({"messages": "messages"}, 1)):
        built = program(RECIPE, LLAMA, {"train": {"s": path}, "test_fraction": 0, "columns": columns})
        with pytest.raises(DataError, match=rf"x\.jsonl, line {line}: "):
            built.inspect("s")


def test_rows_without_text_are_no_examples(tmp_path: Path) -> None:
    path = rows(tmp_path / "x.jsonl", [{"text": ""}])
    model = {"config": LLAMA["config"], "tokenizer": "bytes"}
    built: Any = program(RECIPE, model, {"train": {"s": path}, "test_fraction": 0})
    with pytest.raises(DataError, match=r"site s, round 1: .*no text"):
        built.train("s", plan(built.initial()), None)


@pytest.mark.parametrize(
    ("recipe", "columns", "message"),
    [
        ({"max_lenght": 5}, {}, "no option 'max_lenght'.*Did you mean 'max_length'"),
        ({"max_length": 1}, {}, "recipe.max_length must be at least 2"),
        ({"text_rows": "word"}, {}, "text_rows"),
        ({}, {"text": "a", "prompt": "b"}, "three forms of data"),
        ({}, {"txet": "a"}, "no role 'txet'.*Did you mean 'text'"),
    ],
)
def test_bad_options(texts: dict[str, Any], recipe: Any, columns: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        program({"name": "causal-lm", **recipe}, LLAMA, {**texts, "columns": columns})


def test_more_tokens_than_the_model_has_positions_for(texts: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=r"recipe.max_length is 129 tokens; the model takes at most 128"):
        program({"name": "causal-lm", "max_length": 129}, LLAMA, texts).initial()


def test_a_diverging_site_is_named_with_its_step(texts: dict[str, Any]) -> None:
    built = program(RECIPE, LLAMA, texts, train={**SGD, "lr": 1e30})
    with pytest.raises(NonFiniteError, match=r"site a, round 1: The loss of step \d is nan. Lower train.lr"):
        built.train("a", plan(built.initial()), None)


def test_closing_frees_and_using_loads_again(texts: dict[str, Any]) -> None:
    built: Any = program(RECIPE, LLAMA, texts, train=SGD)
    start = built.initial()
    first = built.train("a", plan(start), None)
    built.close()
    assert isinstance(built, FineTune)
    assert same(built.train("a", plan(start), None).params, first.params)


def test_a_shared_model_of_another_job_is_refused(texts: dict[str, Any]) -> None:
    built = program(RECIPE, LLAMA, texts)
    with pytest.raises(ModelError, match="site a, round 1: The shared model lacks tensor"):
        built.train("a", plan({}), None)


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_while_saving_is_told_as_such(texts: dict[str, Any], tmp_path: Path, room: int) -> None:
    built = program(RECIPE, {**LLAMA, "adapter": {"method": "lora", "r": 256}}, texts)
    params = built.initial()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(StorageError, match="Free some space"):
            built.export(params, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
