# SPDX-License-Identifier: Apache-2.0
"""From a job's data section to sites: the tables of the module's docstring, row by row, and every complaint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from hansa.core.config import Job, parse
from hansa.errors import DataError, JobError
from hansa.recipes import data
from hansa.recipes.data import SiteData

ROLES = ("text", "label")


def job(folder: Path, partition: Any = None, **section: Any) -> Job:
    values = {"name": "x", "recipe": "causal-lm", "data": section, "directory": str(folder)}
    return parse(values if partition is None else {**values, "partition": partition})


def write(path: Path, texts: Sequence[Any], **more: Sequence[Any]) -> None:
    rows = [{"text": t, **{k: v[i] for k, v in more.items()}} for i, t in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))


def loaded(sites: SiteData) -> dict[str, tuple[list[Any], list[Any]]]:
    splits = {site: sites.load(site) for site in sites.names}
    return {site: (s.train.column("text"), s.test.column("text")) for site, s in splits.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "berlin.jsonl", [f"b{i}" for i in range(10)], who=["x", "y"] * 5)
    write(tmp_path / "ulm.jsonl", [f"u{i}" for i in range(5)], who=["y"] * 5)
    write(tmp_path / "exam.jsonl", [f"e{i}" for i in range(4)], who=["x", "y", "y", "z"])
    return tmp_path


@pytest.mark.parametrize("train", [["berlin.jsonl", "ulm.jsonl"], "[bu]*.jsonl"])
def test_without_a_partition_each_file_is_a_site(folder: Path, train: Any) -> None:
    found = loaded(SiteData(job(folder, train=train), ROLES))
    assert set(found) == {"berlin", "ulm"}
    assert [len(part) for part in found["berlin"]] == [8, 2]
    assert sorted(found["ulm"][0] + found["ulm"][1]) == [f"u{i}" for i in range(5)]


def test_a_table_names_the_sites_and_their_own_tests(folder: Path) -> None:
    train = {"south": "ulm.jsonl", "north": "berlin.jsonl"}
    found = loaded(SiteData(job(folder, train=train, test={"south": "exam.jsonl"}), ROLES))
    assert found["south"] == ([f"u{i}" for i in range(5)], ["e0", "e1", "e2", "e3"])
    assert found["north"][1] == []


def test_test_files_named_like_sites_are_theirs(folder: Path) -> None:
    (folder / "test").mkdir()
    write(folder / "test" / "ulm.jsonl", ["t"])
    found = loaded(SiteData(job(folder, train="[bu]*.jsonl", test="test/*.jsonl"), ROLES))
    assert found["ulm"][1] == ["t"]
    assert found["berlin"][1] == []


def test_a_common_test_is_dealt_out_so_each_row_is_judged_once(folder: Path) -> None:
    found = loaded(SiteData(job(folder, train="[bu]*.jsonl", test="exam.jsonl"), ROLES))
    assert sorted(found["berlin"][1] + found["ulm"][1]) == ["e0", "e1", "e2", "e3"]
    assert len(found["berlin"][1]) == 2


def test_a_partition_splits_training_and_test_rows_alike(folder: Path) -> None:
    found = loaded(
        SiteData(
            job(folder, {"name": "by_key", "key": "who", "sites": 2}, train="[bu]*.jsonl", test="exam.jsonl"), ROLES
        )
    )
    assert found["x"] == (["b0", "b2", "b4", "b6", "b8"], ["e0"])
    assert found["y"][1] == ["e1", "e2"]
    assert len(found["y"][0]) == 10


def test_a_partition_s_key_may_be_a_role(folder: Path) -> None:
    split = SiteData(
        job(folder, {"name": "by_key", "key": "label"}, train="[bu]*.jsonl", columns={"label": "who"}), ROLES
    )
    assert split.names == ["x", "y"]


@pytest.mark.parametrize("partition", [{"name": "iid", "sites": 3}, "files"])
def test_held_out_rows_are_apart_and_nothing_is_lost(folder: Path, partition: Any) -> None:
    found = loaded(SiteData(job(folder, partition, train="[bu]*.jsonl"), ROLES))
    everything = [row for train, test in found.values() for row in train + test]
    assert sorted(everything) == sorted([f"b{i}" for i in range(10)] + [f"u{i}" for i in range(5)])
    assert all(test for _, test in found.values())
    assert found == loaded(SiteData(job(folder, partition, train="[bu]*.jsonl"), ROLES))


def test_no_fraction_holds_nothing_out_and_limit_counts_rows_a_site(folder: Path) -> None:
    found = loaded(SiteData(job(folder, train="[bu]*.jsonl", test_fraction=0, limit=6), ROLES))
    assert [len(found[site][0]) for site in ("berlin", "ulm")] == [6, 5]
    assert found["ulm"][1] == []


def test_saved_data_sets_are_found_by_their_folder_and_split(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"text": [name] * 3}) for name in ("train", "test", "extra")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    found = loaded(SiteData(job(tmp_path, train="saved", test="saved:extra"), ROLES))
    assert found == {"saved": (["train"] * 3, ["extra"] * 3)}


def test_a_glob_of_image_folders_is_a_site_each(tmp_path: Path) -> None:
    for site in ("berlin", "ulm"):
        folder = tmp_path / "clinics" / site / "ill"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("L", (2, 2)).save(folder / f"{i}.png")
    sites = SiteData(job(tmp_path, train="clinics/*"), ("image", "label"))
    assert sites.names == ["berlin", "ulm"]
    assert sites.load("ulm").train.column("label") == ["ill", "ill"]


def test_a_folder_that_datasets_understands_is_loaded_by_name_and_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "pile").mkdir()
    for split in ("train", "validation"):
        write(folder / "pile" / f"{split}.jsonl", [split] * 3)
    found = loaded(SiteData(job(folder, train="pile", test="pile:validation", format="hub"), ROLES))
    assert found == {"pile": (["train"] * 3, ["validation"] * 3)}


def test_a_folder_of_files_is_a_site_each(folder: Path) -> None:
    (folder / "notes.md").write_text("not data")
    assert SiteData(job(folder, train="."), ROLES).names == ["berlin", "exam", "ulm"]


BAD_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"train": {"a": "ulm.jsonl"}, "partition": {"name": "iid", "sites": 2}}, "names the sites already"),
    ({"train": "ulm.jsonl", "columns": {"lable": "x"}}, "no role 'lable'.*Did you mean 'label'"),
    ({"train": {"ulm": "ulm.jsonl"}, "test": {"ulmm": "ulm.jsonl"}}, "no site of this job: 'ulmm'. Did you mean 'ulm'"),
    ({"train": ["ulm.jsonl", "ulm.jsonl"]}, "Two inputs of data.train are called 'ulm'"),
]


@pytest.mark.parametrize(("section", "message"), BAD_JOBS)
def test_bad_sections(folder: Path, section: dict[str, Any], message: str) -> None:
    section = dict(section)
    partition = section.pop("partition", None)
    with pytest.raises(JobError, match=message):
        _ = SiteData(job(folder, partition, **section), ROLES).names


def test_a_job_without_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"add a \[data\] section"):
        SiteData(parse({"name": "x", "recipe": "causal-lm"}), ROLES)


BAD_DATA: list[tuple[dict[str, Any], str]] = [
    ({"train": "ullm.jsonl"}, r"has no 'ullm.jsonl'. Did you mean 'ulm.jsonl'\?$"),
    ({"train": "imdb"}, "has no 'imdb'.*For a data set on the hub set data.format = 'hub'"),
    ({"train": "dat/ulm.jsonl"}, "has no 'dat'"),
    ({"train": "*.csv"}, "matches no file"),
    ({"train": "ulm.jsonl", "format": "arrow"}, "is a file; data of format 'arrow' are a folder"),
    ({"train": "ulm.jsonl:train"}, "has no 'ulm.jsonl:train'"),
    ({"train": "notes.md"}, "suffix does not tell its format. Set data.format"),
    ({"train": {"ulm": "empty.jsonl"}}, "site ulm: The site has no examples to train on in empty.jsonl"),
    ({"train": {"ulm": "one.jsonl"}}, "site ulm: The site has one row .*one.jsonl, line 1.*data.test_fraction = 0"),
    ({"train": ["empty.jsonl"], "partition": {"name": "iid", "sites": 2}}, "no rows in empty.jsonl"),
    ({"train": "ulm.jsonl", "partition": {"name": "dirichlet", "sites": 2}}, "no column 'label'"),
]


@pytest.mark.parametrize(("section", "message"), BAD_DATA)
def test_bad_data(folder: Path, section: dict[str, Any], message: str) -> None:
    section = dict(section)
    (folder / "empty.jsonl").write_text("")
    (folder / "notes.md").write_text("x")
    write(folder / "one.jsonl", ["x"])
    with pytest.raises(DataError, match=message):
        loaded(SiteData(job(folder, section.pop("partition", None), **section), ROLES))


def test_labels_by_name_or_index_and_everything_else_by_line(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", ["a", "b", "c", "d"], label=["no", "yes", 1, "0"])
    sites = SiteData(job(tmp_path, train="x.jsonl", test_fraction=0), ROLES)
    train = sites.load("x").train
    assert data.label_indices(train, "label", ["no", "yes"]) == [0, 1, 1, 0]
    assert data.histogram(["no", "yes", "maybe"], [0, 1, 1]) == {"no": 1, "yes": 2, "maybe": 0}
    with pytest.raises(
        DataError, match=r"x\.jsonl, line 2: the label 'yes' is not in data\.labels .*Did you mean 'yess'"
    ):
        data.label_indices(train, "label", ["no", "yess"])


@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_text_of_another_type_is_named_by_line(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "x.jsonl", ["a", value])
    sites = SiteData(job(tmp_path, train="x.jsonl", test_fraction=0), ROLES)
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: 'text' \(column 'text'\) must be text, it is"):
        data.texts(sites.load("x").train, "text")
