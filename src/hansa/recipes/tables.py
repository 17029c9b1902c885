# SPDX-License-Identifier: Apache-2.0
"""Data sets on disk as tables: JSON lines, JSON, CSV, TSV, Parquet, CoNLL, text, image folders, npz, Arrow, hub.

A :class:`Table` is a choice of rows from one or several :class:`Source`; columns are read when they are asked
for, and every complaint can name file and line. Text formats may be gzipped (``.gz``).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hansa.errors import DataError, nearest
from hansa.recipes import hub
from hansa.registry import missing

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".txt": "text",
    ".text": "text",
    ".npz": "npz",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")

TextRows = Literal["file", "paragraph", "line"]
Gather = Callable[[Sequence[int]], list[Any]]


@dataclass(frozen=True)
class Source:
    """One input: a file, a folder of images, or a hub data set's split.

    Attributes:
        path: as it is named in messages.
        stem: its name without folder and suffixes.
        num_rows: how many rows it has.
        columns: column -> function that returns the values of some of its rows.
        lines: the line that each row starts on, where rows are lines.
    """

    path: str
    stem: str
    num_rows: int
    columns: Mapping[str, Gather]
    lines: Sequence[int] | None = None


@dataclass(frozen=True)
class Table:
    """Some rows of some sources, in a given order.

    Attributes:
        inputs: the sources.
        rows: (number of rows, 2): index of the source, index of the row in it.
        aliases: role -> column; :meth:`column` takes either.
    """

    inputs: tuple[Source, ...]
    rows: NDArray[np.int64]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Iterable[Source], aliases: Mapping[str, str]) -> Table:
        """Return all rows of ``inputs``."""
        inputs = tuple(inputs)
        pieces = [np.stack([np.full(s.num_rows, i), np.arange(s.num_rows)], 1) for i, s in enumerate(inputs)]
        rows = np.concatenate(pieces) if pieces else np.empty((0, 2))
        return cls(inputs, rows.astype(np.int64), aliases)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Table:
        """Return the table of these rows, in this order."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    @property
    def sources(self) -> list[str]:
        """For each row, the stem of its file; the folder's name is put before it where stems are not unique."""
        stems = [source.stem for source in self.inputs]
        names = [
            stem if stems.count(stem) == 1 else f"{Path(source.path).parent.name}-{stem}"
            for stem, source in zip(stems, self.inputs, strict=True)
        ]
        return [names[source] for source, _ in self.rows]

    def where(self, index: int) -> str:
        """Return file and line of a row, for messages."""
        source, row = self.rows[index]
        lines = self.inputs[source].lines
        place = f"row {row + 1}" if lines is None else f"line {lines[row]}"
        return f"{self.inputs[source].path}, {place}"

    def folder(self, index: int) -> Path:
        """Return the folder that a row's file lies in, which paths in the row are relative to."""
        return Path(self.inputs[self.rows[index, 0]].path).parent

    def column(self, name: str) -> list[Any]:
        """Return one value a row of the column that ``name``, a role or a column, stands for.

        Raises:
            DataError: a file has no such column; its columns and the nearest one are named.
        """
        column = self.aliases.get(name, name)
        values: list[Any] = [None] * len(self)
        for i, source in enumerate(self.inputs):
            positions = np.flatnonzero(self.rows[:, 0] == i)
            if not positions.size:
                continue
            if column not in source.columns:
                raise DataError(_no_column(source, name, column))
            found = source.columns[column](self.rows[positions, 1].tolist())
            for position, value in zip(positions, found, strict=True):
                values[position] = value
        return values


def _no_column(source: Source, name: str, column: str) -> str:
    wanted = f"{column!r}" if column == name else f"{column!r} (for {name!r})"
    known = ", ".join(source.columns) or "none"
    return (
        f"{source.path} has no column {wanted}; it has: {known}.{nearest(column, source.columns)} "
        f"Set data.columns.{name} to the column that holds it."
    )


def read(path: Path, kind: str, text_rows: TextRows = "file") -> Source:
    """Read one file or folder of a known format.

    Args:
        path: the file; a folder for ``images`` and ``arrow``.
        kind: a value of ``data.format`` other than ``hub``.
        text_rows: what a row of a text file is.

    Raises:
        DataError: it can't be read or is not of that format; file and line are named.
        MissingExtraError: the library that reads it is not installed.
    """
    readers: Mapping[str, Callable[[Path], Source]] = {
        "jsonl": _jsonl,
        "json": _json,
        "csv": lambda path: _delimited(path, ","),
        "tsv": lambda path: _delimited(path, "\t"),
        "parquet": _parquet,
        "conll": _conll,
        "text": lambda path: _text(path, text_rows),
        "images": _images,
        "npz": _npz,
    }
    try:
        return readers[kind](path)
    except ModuleNotFoundError as error:
        raise missing(error) or error from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it, or set data.format.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} can't be read: {reason}.") from None


def stem_of(path: Path) -> str:
    """Return the file's name without its known suffixes."""
    stem = path.name.removesuffix(".gz")
    return Path(stem).stem if Path(stem).suffix.lower() in SUFFIXES else stem


def _listed(values: Sequence[Any]) -> Gather:
    return lambda rows: [values[row] for row in rows]


def _listed_source(path: Path, columns: Mapping[str, Sequence[Any]], lines: Sequence[int] | None = None) -> Source:
    count = len(next(iter(columns.values()), ()))
    return Source(str(path), stem_of(path), count, {n: _listed(v) for n, v in columns.items()}, lines)


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Iterable[str]]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield file
    else:
        with path.open(encoding="utf-8-sig") as file:
            yield file


def _jsonl(path: Path) -> Source:
    records, lines = [], []
    with _lines(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number} is no JSON object ({{...}}) but {type(record).__name__}.")
            records.append(record)
            lines.append(number)
    return _records(path, records, lines)


def _json(path: Path) -> Source:
    with _lines(path) as file:
        text = "".join(file)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}. One object a line is format 'jsonl'.") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise DataError(f"{path}: the columns have different lengths.")
        return _listed_source(path, value)
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise DataError(f"{path} must hold a list of objects, or one object of lists (columns).")
    return _records(path, value, None)


def _records(path: Path, records: Sequence[Mapping[str, Any]], lines: Sequence[int] | None) -> Source:
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name: [record.get(name) for record in records] for name in names}
    return replace(_listed_source(path, columns, lines), num_rows=len(records))


def _delimited(path: Path, delimiter: str) -> Source:
    from pyarrow import csv, lib

    try:
        header = csv.open_csv(path, parse_options=_csv_options(delimiter)).schema.names
        table = csv.read_csv(
            path,
            parse_options=_csv_options(delimiter),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(header, "string")),
        )
    except lib.ArrowInvalid as error:
        raise DataError(f"{path} is not a well-formed table: {error}") from None
    return _arrow_source(path, table)


def _csv_options(delimiter: str) -> Any:
    from pyarrow import csv

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _parquet(path: Path) -> Source:
    from pyarrow import lib, parquet

    try:
        table = parquet.read_table(path, memory_map=True)
    except (lib.ArrowInvalid, lib.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from None
    return _arrow_source(path, table)


def _arrow_source(path: Path, table: Any) -> Source:
    def gather(name: str) -> Gather:
        return lambda rows: list(table.column(name).take(rows).to_pylist()) if rows else []

    return Source(str(path), stem_of(path), table.num_rows, {name: gather(name) for name in table.column_names})


def _conll(path: Path) -> Source:
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    starts = [1]
    with _lines(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if not text.strip() or text.startswith("-DOCSTART-"):
                if words[-1]:
                    words.append([])
                    tags.append([])
                continue
            fields = text.split("\t") if "\t" in text else text.split()
            if len(fields) < 2:
                raise DataError(f"{path}, line {number} has a word without a tag: {text!r}.")
            if not words[-1]:
                starts[len(words) - 1 :] = [number]
            words[-1].append(fields[0])
            tags[-1].append(fields[-1].strip())
    if not words[-1]:
        del words[-1], tags[-1]
    return _listed_source(path, {"words": words, "tags": tags}, starts[: len(words)])


def _text(path: Path, unit: TextRows) -> Source:
    with _lines(path) as file:
        if unit == "file":
            text = "".join(file)
            return _listed_source(path, {"text": [text] if text.strip() else []}, [1])
        rows: list[str] = []
        starts: list[int] = []
        fresh = True
        for number, line in enumerate(file, start=1):
            if not line.strip():
                fresh = True
            elif fresh or unit == "line":
                rows.append(line.rstrip("\r\n"))
                starts.append(number)
                fresh = False
            else:
                rows[-1] += "\n" + line.rstrip("\r\n")
    return _listed_source(path, {"text": rows}, starts)


def _images(path: Path) -> Source:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.parent != path)
    if not files:
        raise DataError(
            f"{path} holds no images. Put each image in a folder named after its label: {path.name}/LABEL/x.png."
        )
    columns: dict[str, Sequence[Any]] = {
        "image": [file.absolute() for file in files],
        "label": [file.parent.name for file in files],
    }
    return replace(_listed_source(path, columns), stem=path.name)


def _npz(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise DataError(f"{path} can't be read as npz: {error}. Arrays of objects are not read.") from None
    longest = max((len(array) for array in arrays.values() if array.ndim), default=0)
    columns = {
        name: array.tolist() if array.ndim == 1 else array
        for name, array in arrays.items()
        if array.ndim and len(array) == longest
    }
    return replace(_listed_source(path, columns), num_rows=longest)


def saved_dataset(path: Path, split: str) -> Source:
    """Open what ``datasets.save_to_disk`` wrote; of several splits, the one called ``split``.

    Raises:
        DataError: it holds no data set, or no such split.
        MissingExtraError: ``datasets`` is not installed.
    """
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is no data set saved by datasets.save_to_disk: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}; it has: {', '.join(found)}.{nearest(split, found)}")
        found = found[split]
    return _dataset_source(str(path), path.name, found)


def hub_dataset(name: str, config: str | None, split: str) -> Source:
    """Load one split of a hub data set (or of a local folder that ``datasets.load_dataset`` understands).

    Raises:
        DataError: there is no such data set or split, or the hub can't be reached.
        MissingExtraError: ``datasets`` is not installed.
    """
    datasets = _datasets()
    if not Path(name).is_dir() and not hub.online() and not hub.forced_offline():
        raise DataError(
            f"The data set {name!r} can't be fetched: the hub can't be reached from here. Fetch it elsewhere, save it "
            "with datasets.save_to_disk, and give that folder as data.train. If it is in this machine's cache, set "
            "HF_HUB_OFFLINE=1."
        )
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The data set {name!r} (split {split!r}) can't be loaded: {reason.rstrip('.')}. "
            "Check its name, configuration and split: NAME@CONFIG:SPLIT."
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    return _dataset_source(f"{name}:{split}", name.rpartition("/")[2], found)


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing(error) or error from error
    return datasets


def _dataset_source(path: str, stem: str, dataset: Any) -> Source:
    def gather(name: str) -> Gather:
        column = dataset.select_columns([name])
        return lambda rows: list(column[rows][name]) if rows else []

    return Source(path, stem, len(dataset), {name: gather(name) for name in dataset.column_names})
