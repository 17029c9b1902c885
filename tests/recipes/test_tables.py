# SPDX-License-Identifier: Apache-2.0
"""Files as tables: what pyarrow, Pillow, datasets and json wrote is what is read, and damage is named by line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from hansa.errors import DataError
from hansa.recipes import tables
from hansa.recipes.tables import Table

ROWS = [{"text": 'one, "two"\nthree', "label": "a"}, {"text": "é世😀", "label": "7"}, {"text": "", "label": "NA"}]


def jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def as_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def columns_json(path: Path) -> None:
    path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}), encoding="utf-8")


def delimited(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def as_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": jsonl,
    "rows.json": as_json,
    "columns.json": columns_json,
    "rows.csv": delimited(","),
    "rows.tsv": delimited("\t"),
    "rows.parquet": as_parquet,
}


def read(path: Path, **aliases: str) -> Table:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return Table.of([tables.read(path, tables.SUFFIXES[suffix])], aliases)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    if zipped and path.suffix != ".parquet":
        packed = path.with_name(f"{name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    table = read(path, label="label")
    assert table.column("text") == [row["text"] for row in ROWS]
    assert table.column("label") == ["a", "7", "NA"]
    assert table.sources == [name.partition(".")[0]] * 3
    assert table.take([2, 0]).column("text") == ["", ROWS[0]["text"]]


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(), st.lists, max_leaves=5)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), min_size=1, max_size=5), st.data())
def test_json_lines_of_any_shape_are_read_back(tmp_path_factory: Any, rows: list[dict[str, Any]], data: Any) -> None:
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    name = data.draw(st.sampled_from(sorted({name for row in rows for name in row})))
    assert read(path).column(name) == [row.get(name) for row in rows]


def test_two_files_are_one_table_that_knows_where_each_row_is_from(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"x": 1}\n{"x": 2}\n')
    (tmp_path / "b.csv").write_text("y,x\n,3\n")
    table = Table.of(
        [tables.read(tmp_path / "a.jsonl", "jsonl"), tables.read(tmp_path / "b.csv", "csv")], {"role": "x"}
    )
    table = table.take([2, 1])
    assert table.column("role") == ["3", 2]
    assert table.where(0) == f"{tmp_path / 'b.csv'}, row 1"
    assert table.where(1) == f"{tmp_path / 'a.jsonl'}, line 3"
    assert table.sources == ["b", "a"]


def test_files_of_one_name_in_two_folders_are_two_sources(tmp_path: Path) -> None:
    for folder in ("berlin", "ulm"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"x": 1}')
    table = Table.of([tables.read(tmp_path / f / "train.jsonl", "jsonl") for f in ("berlin", "ulm")], {})
    assert table.sources == ["berlin-train", "ulm-train"]


def test_conll_sentences_and_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("-DOCSTART- -X- O\n\nAnna\tB-PER\nsings\tO\n\n\nUlm NN B-LOC\n", encoding="utf-8")
    table = read(path)
    assert table.column("words") == [["Anna", "sings"], ["Ulm"]]
    assert table.column("tags") == [["B-PER", "O"], ["B-LOC"]]
    assert [table.where(i).rpartition(" ")[2] for i in range(2)] == ["3", "7"]


def test_wnut17_has_the_published_counts(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("ner-wnut17")
    counts = {}
    for part in ("train", "dev", "test"):
        words = read(folder / f"{part}.conll").column("words")
        counts[part] = (len(words), sum(map(len, words)))
    assert counts == {"train": (3394, 62730), "dev": (1009, 15733), "test": (1287, 23394)}


def test_gzipped_json_lines_of_clinc150_have_the_published_counts(shared_data: Callable[[str], Path]) -> None:
    table = read(shared_data("clinc150") / "train.jsonl.gz")
    assert len(table) == 15100
    assert len(set(table.column("intent"))) == 151


@pytest.mark.parametrize(
    ("unit", "rows", "lines"),
    [
        ("file", ["a\nb\n\n\nc\n"], [1]),
        ("paragraph", ["a\nb", "c"], [1, 5]),
        ("line", ["a", "b", "c"], [1, 2, 5]),
    ],
)
def test_text_rows(tmp_path: Path, unit: tables.TextRows, rows: list[str], lines: list[int]) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\nb\n\n\nc\n")
    table = Table.of([tables.read(path, "text", unit)], {})
    assert table.column("text") == rows
    assert [int(table.where(i).rpartition(" ")[2]) for i in range(len(table))] == lines


def test_image_folders_and_npz(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / "pets" / label / "1.png")
    table = Table.of([tables.read(tmp_path / "pets", "images")], {})
    assert table.column("label") == ["cat", "dog"]
    assert [path.name for path in table.column("image")] == ["1.png", "1.png"]
    np.savez(tmp_path / "x.npz", pixels=np.arange(8, dtype=np.uint8).reshape(2, 2, 2), y=[3, 4], names=["z"])
    table = read(tmp_path / "x.npz")
    assert table.column("y") == [3, 4]
    assert table.column("pixels")[1].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(DataError, match="no column 'names'"):
        table.column("names")


@pytest.mark.filterwarnings("ignore")
def test_saved_data_sets_and_folders_that_datasets_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "saved"))
    assert Table.of([tables.saved_dataset(tmp_path / "saved", "test")], {}).column("x") == [1]
    with pytest.raises(DataError, match=r"no split 'tset'; it has: train, test\. Did you mean 'test'"):
        tables.saved_dataset(tmp_path / "saved", "tset")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"x": 5}\n{"x": 6}')
    assert Table.of([tables.hub_dataset(str(tmp_path / "folder"), None, "train")], {}).column("x") == [5, 6]
    with pytest.raises(DataError, match="Check its name, configuration and split"):
        tables.hub_dataset(str(tmp_path / "folder"), None, "validation")


def test_a_hub_out_of_reach_is_said_without_a_minute_of_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from hansa.recipes import hub

    # A port on this machine that nobody listens on: the real probe, really refused.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.online.cache_clear()
    try:
        with pytest.raises(DataError, match=r"'imdb' can't be fetched: the hub can't be reached.*save_to_disk"):
            tables.hub_dataset("imdb", None, "train")
    finally:
        hub.online.cache_clear()


BROKEN = {
    "x.jsonl": ('{"a": 1}\n{"a": 2', "x.jsonl, line 2 is not JSON"),
    "y.jsonl": ("[1]", "y.jsonl, line 1 is no JSON object"),
    "x.json": ('{"a": 1}', "must hold a list of objects"),
    "y.json": ('{"a": [1], "b": []}', "different lengths"),
    "x.csv": ("a,b\n1,2\n1,2,3\n", "x.csv is not a well-formed table"),
    "x.parquet": ("PAR0", "x.parquet is no Parquet file"),
    "x.conll": ("Anna\tB-PER\nsings\n", "x.conll, line 2 has a word without a tag: 'sings'"),
    "x.npz": ("junk", "x.npz can't be read"),
    "x.jsonl.gz": ("junk", "x.jsonl.gz can't be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read(path)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Arrays of objects are not read"):
        read(tmp_path / "x.npz")


def test_a_folder_of_loose_images_says_where_they_belong(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match="Put each image in a folder named after its label"):
        tables.read(tmp_path, "images")


def test_a_missing_column_names_the_file_its_columns_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"sentence": "a", "intent": "b"}')
    with pytest.raises(DataError) as caught:
        read(tmp_path / "x.jsonl", text="sentense").column("text")
    assert str(caught.value) == (
        f"{tmp_path / 'x.jsonl'} has no column 'sentense' (for 'text'); it has: sentence, intent. "
        "Did you mean 'sentence'? Set data.columns.text to the column that holds it."
    )
