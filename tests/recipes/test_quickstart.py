# SPDX-License-Identifier: Apache-2.0
"""The quickstart's corpora are what they claim to be, its base is made once, and its jobs are jobs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from hansa.errors import DataError, JobError, ModelError, StorageError
from hansa.recipes import causal_lm, quickstart
from hansa.recipes.quickstart import Corpora, Pretraining, SiteText

SMALL = Pretraining(steps=5, warmup=2, batch_size=2)
TINY = {**quickstart.MODEL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def small_corpora(word: str = "spam") -> Corpora:
    lines = f"def {word}():\n    return {word!r}\n" * 40
    sites = {
        site: SiteText({f"{site}/a.py": lines}, {f"{site}/b.py": lines}, {f"{site}/c.py": lines[:500]})
        for site in ("east", "west")
    }
    return Corpora({"public.py": lines}, sites)


@pytest.fixture(scope="module")
def corpora() -> Corpora:
    return quickstart.gather()


def test_gathering_is_deterministic(corpora: Corpora) -> None:
    assert quickstart.gather() == corpora
    assert quickstart.gather().digest == corpora.digest


def test_no_file_is_in_two_texts(corpora: Corpora) -> None:
    texts = [set(corpora.public)]
    for site in corpora.sites.values():
        texts += [set(site.train), set(site.validation), set(site.test)]
    for one, other in itertools.combinations(texts, 2):
        assert not one & other


def test_the_base_reads_nothing_of_what_sites_own() -> None:
    owned = {module for modules in quickstart.SITES.values() for module in modules}
    assert not owned & set(quickstart.PUBLIC)
    assert len(owned) == sum(len(modules) for modules in quickstart.SITES.values())


def test_every_site_has_little_text_of_the_agreed_size(corpora: Corpora) -> None:
    assert len(corpora.sites) >= 6
    for name, site in corpora.sites.items():
        train, validation, test = (
            sum(len(text.encode()) for text in texts.values()) for texts in (site.train, site.validation, site.test)
        )
        assert 0.7 * quickstart.TRAIN_BYTES <= train <= quickstart.TRAIN_BYTES, name
        for held_out in (validation, test):
            assert 0.6 * quickstart.HELD_OUT_BYTES <= held_out <= quickstart.HELD_OUT_BYTES, name


def test_texts_are_cut_at_line_ends_inside_their_limit() -> None:
    assert quickstart._cut("añb\ncd\nef\n", 7) == "añb\n"
    assert quickstart._cut("añb\ncd\nef\n", 8) == "añb\ncd\n"
    assert quickstart._cut("abc\n", 4) == "abc\n"
    assert quickstart._cut("abcdef", 3) == ""


def test_sources_are_read_in_their_own_encoding_and_tests_are_left_out(tmp_path: Path) -> None:
    body = "x = 1  # filler\n" * 50
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "latin.py").write_bytes(f"# -*- coding: latin-1 -*-\n# é\n{body}".encode("latin-1"))
    write(tmp_path, "json/tests/test_it.py", body)
    write(tmp_path, "json/short.py", "x = 1\n")
    found = quickstart._sources(tmp_path, ["json", "absent"])
    assert list(found) == ["json/latin.py"]
    assert "é" in found["json/latin.py"]


def test_an_interpreter_without_its_sources_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"use an interpreter that ships them"):
        quickstart.gather(tmp_path)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "bad.py").write_bytes(b"# coding: utf-8\n" + b"\xff\n" * 500)
    with pytest.raises(DataError, match=r"bad\.py can't be read"):
        quickstart.gather(tmp_path)


def test_site_files_are_written_once_and_hold_the_texts(tmp_path: Path) -> None:
    corpora = small_corpora()
    files = quickstart.write_sites(corpora, tmp_path)
    assert sorted(files.train) == sorted(files.test) == ["east", "west"]
    written = files.train["east"] / "east.a.txt"
    assert written.read_text(encoding="utf-8") == corpora.sites["east"].train["east/a.py"]
    assert not list(files.train["east"].parent.rglob("*east.b*")), "validation text is for the authors only"
    before = written.stat().st_mtime_ns
    assert quickstart.write_sites(corpora, tmp_path) == files
    assert written.stat().st_mtime_ns == before


def test_the_base_is_made_once_for_each_text_and_plan(tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    base = quickstart.pretrained(
        small_corpora(), lambda *seen: told.append(seen), cache=tmp_path, plan=SMALL, model=TINY
    )
    assert not base.cached
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5]
    assert {total for _, total, _ in told} == {5}
    assert 4 < base.loss < 7, "a model that has seen nothing is near ln 259 nats per byte"
    assert base.num_bytes == 5 * 2 * quickstart.MAX_LENGTH

    again = quickstart.pretrained(small_corpora(), cache=tmp_path, plan=SMALL, model=TINY)
    assert again.cached
    assert (again.directory, again.loss) == (base.directory, base.loss)

    other_text = quickstart.pretrained(small_corpora("ham"), cache=tmp_path, plan=SMALL, model=TINY)
    other_plan = quickstart.pretrained(
        small_corpora(), cache=tmp_path, plan=Pretraining(steps=1, batch_size=2), model=TINY
    )
    assert not other_text.cached
    assert not other_plan.cached
    assert len({base.directory, other_text.directory, other_plan.directory}) == 3


def test_the_base_opens_like_any_other_model(tmp_path: Path) -> None:
    import transformers

    base = quickstart.pretrained(small_corpora(), cache=tmp_path, plan=SMALL, model=TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.directory)
    text = "def spam(é):\n    pass\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == len(tokenizer)


def test_an_unfinished_base_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickstart.pretrained(small_corpora(), stop, cache=tmp_path, plan=SMALL, model=TINY)
    assert not list((tmp_path / "quickstart").iterdir())


def test_a_cache_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        quickstart.write_sites(small_corpora(), blocked)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert quickstart.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("HANSA_CACHE")
    assert quickstart.cache_directory() == tmp_path / "shared" / "hansa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quickstart.cache_directory() == tmp_path / ".cache" / "hansa"


def test_the_job_loads_and_every_site_has_data(tmp_path: Path) -> None:
    corpora = small_corpora()
    base = quickstart.pretrained(corpora, cache=tmp_path, plan=SMALL, model=TINY)
    job = quickstart.job(base.directory, quickstart.write_sites(corpora, tmp_path), seed=3)
    assert job.seed == 3
    assert job.output.model == "last", "picking a round by held-out data would be tuning on them"
    assert (job.baselines.base, job.baselines.local, job.baselines.central) == (True, True, True)
    program = causal_lm.build(job)
    assert list(program.sites) == ["east", "west"]
    assert program.inspect("east").counts == {"train": 1, "test": 1}
    assert all("lora" in name for name in program.initial())


def test_any_base_and_data_make_a_job(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    base = shared_data("stories260k-llama")
    job = quickstart.job_for_base(base, shared_data("shakespeare-roles") / "speeches.jsonl.gz", key="play", sites=6)
    program = causal_lm.build(job)
    assert len(program.sites) == 6
    assert program.inspect(program.sites[0]).counts["test"] > 0


def test_a_base_or_data_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="no data file"):
        quickstart.job_for_base(tmp_path, data, key="who")
    data.write_text('{"text": "a", "who": "b"}\n')
    with pytest.raises(ModelError, match="no model folder"):
        quickstart.job_for_base(tmp_path / "absent", data, key="who")
    with pytest.raises(JobError, match="at least two sites"):
        quickstart.job_for_base(tmp_path, data, key="who", sites=1)
