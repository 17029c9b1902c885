# SPDX-License-Identifier: Apache-2.0
"""From a job's data section to each site's training and held-out rows, checked against the job.

| ``data.train`` | ``partition`` | sites |
|---|---|---|
| a table SITE = input | none (JobError if given) | the table's names |
| inputs | none | one for each input, named after it |
| inputs | given | what the partition makes of all rows together |

| ``data.test`` | held-out rows of a site |
|---|---|
| left out | ``test_fraction`` of its rows, at random |
| a table SITE = input | its own input; none if the table does not name it |
| inputs, with a partition | partitioned together with the training rows, so a site's two sets are alike |
| inputs, each named like a site | the input of its name |
| other inputs | an equal random share: each row is judged once |

An input is a file, a folder (of images, of files, or saved by ``datasets``), a glob, or, with format ``hub``,
``NAME``, ``NAME:SPLIT`` or ``NAME@CONFIG:SPLIT``; a saved data set takes ``FOLDER:SPLIT`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hansa import registry
from hansa.core import rng
from hansa.core.config import DataSection, Job
from hansa.errors import DataError, JobError, nearest
from hansa.partition.iid import iid
from hansa.partition.rows import Partition, site_names
from hansa.recipes import tables
from hansa.recipes.tables import Source, Table, TextRows

Spec = str | Sequence[str]


@dataclass(frozen=True)
class Split:
    """A site's training rows and held-out rows."""

    train: Table
    test: Table


@dataclass(frozen=True)
class Input:
    """Something to read, not read yet."""

    stem: str
    open: Callable[[], Source]


class SiteData:
    """The data of all sites of a job; each site's are read when they are first asked for.

    Args:
        job: the job.
        roles: the roles that ``data.columns`` may map to columns.
        text_rows: what a row of a text file is.

    Raises:
        JobError: there is no data section, it names an unknown role, or it does not go with the partition.
        DataError: an input that the sites' names depend on is missing or can't be read.
    """

    def __init__(self, job: Job, roles: Sequence[str], text_rows: TextRows = "file") -> None:
        if job.data is None:
            raise JobError(f"The recipe {job.recipe.name!r} needs data: add a [data] section with train = ...")
        for role in job.data.columns:
            if role not in roles:
                raise JobError(
                    f"data.columns: this recipe has no role {role!r}; it has: {', '.join(roles)}.{nearest(role, roles)}"
                )
        if isinstance(job.data.train, Mapping) and job.partition is not None:
            raise JobError("data.train names the sites already: leave out [partition], or give data.train as a list.")
        self._job = job
        self._data: DataSection = job.data
        self._text_rows = text_rows
        self._partition: Partition | None = None
        if job.partition is not None:
            self._partition = registry.build("partitions", job.partition.name, job.partition.options)
        if isinstance(self._data.test, Mapping):
            for site in self._data.test:
                if site not in self.names:
                    raise JobError(f"data.test names no site of this job: {site!r}.{nearest(site, self.names)}")

    @cached_property
    def names(self) -> list[str]:
        """The sites' names, sorted."""
        if isinstance(self._data.train, Mapping):
            return sorted(self._data.train)  # without a look at the files: a server has nobody's
        return sorted(self._pooled if self._partition else self._inputs)

    def load(self, site: str) -> Split:
        """Return a site's rows.

        Raises:
            DataError: an input is missing or unreadable, or the site has nothing to train on or to hold out.
        """
        if site not in self.names:
            raise DataError(f"There is no site {site!r}.{nearest(site, self.names)}")
        try:
            split = self._pooled[site] if self._partition else self._own(site)
            if isinstance(self._data.test, Mapping):
                split = Split(split.train, self._table(self._data.test.get(site, []), "test"))
            elif self._data.test is None and self._data.test_fraction:
                split = self._held_out(site, split.train)
            if not len(split.train):
                raise DataError(f"The site has no examples to train on in {_shown(self._spec(site))}.")
        except DataError as error:
            error.site = error.site or site
            raise
        return Split(self._limited(site, "train", split.train), self._limited(site, "test", split.test))

    def _spec(self, site: str) -> Spec:
        train = self._data.train
        return train[site] if isinstance(train, Mapping) else train

    @cached_property
    def _inputs(self) -> dict[str, list[Input]]:
        train = self._data.train
        if isinstance(train, Mapping):
            return {site: self._resolve(spec, self._data.split) for site, spec in train.items()}
        found = self._resolve(train, self._data.split)
        stems = [each.stem for each in found]
        for stem in stems:
            if stems.count(stem) > 1:
                raise JobError(
                    f"Two inputs of data.train are called {stem!r}, and without a partition each is a site named after "
                    "it. Give data.train as a table SITE = input, or add a [partition]."
                )
        names = site_names(stems)
        return {names[each.stem]: [each] for each in found}

    def _own(self, site: str) -> Split:
        aliases = self._data.columns
        train = Table.of((each.open() for each in self._inputs[site]), aliases)
        return Split(train, self._common_test.get(site, Table.of((), aliases)))

    @cached_property
    def _common_test(self) -> dict[str, Table]:
        if self._data.test is None or isinstance(self._data.test, Mapping):
            return {}
        inputs = self._resolve(self._data.test, "test")
        stems = site_names(each.stem for each in inputs)
        if all(name in self.names for name in stems.values()):
            return {stems[each.stem]: Table.of([each.open()], self._data.columns) for each in inputs}
        table = Table.of((each.open() for each in inputs), self._data.columns)
        shares = iid(len(self.names))(table, self._job.seed).values()
        return {site: table.take(rows) for site, rows in zip(self.names, shares, strict=True)}

    @cached_property
    def _pooled(self) -> dict[str, Split]:
        assert self._partition is not None, "only partitioned data are pooled"
        train = [each.open() for each in self._resolve(self._spec(""), self._data.split)]
        test: list[Source] = []
        if self._data.test is not None and not isinstance(self._data.test, Mapping):
            test = [each.open() for each in self._resolve(self._data.test, "test")]
        pool = Table.of([*train, *test], self._data.columns)
        if not len(pool):
            raise DataError(f"There are no rows in {_shown(self._spec(''))}.")
        splits = {}
        for site, rows in self._partition(pool, self._job.seed).items():
            table = pool.take(rows)
            to_train = table.rows[:, 0] < len(train)
            splits[site] = Split(table.take(np.flatnonzero(to_train)), table.take(np.flatnonzero(~to_train)))
        return splits

    def _table(self, spec: Spec, split: str) -> Table:
        return Table.of((each.open() for each in self._resolve(spec, split)), self._data.columns)

    def _held_out(self, site: str, table: Table) -> Split:
        if len(table) == 1:
            raise DataError(
                f"The site has one row ({table.where(0)}), which can't be both trained on and held out. Give it more "
                "rows (partition.min_rows; for text files recipe.text_rows = 'paragraph'), give data.test, or set "
                "data.test_fraction = 0."
            )
        count = min(len(table) - 1, max(1, round(len(table) * self._data.test_fraction))) if len(table) else 0
        order = rng.generator(self._job.seed, "held-out", site).permutation(len(table))
        return Split(table.take(np.sort(order[count:])), table.take(np.sort(order[:count])))

    def _limited(self, site: str, part: str, table: Table) -> Table:
        if self._data.limit is None or len(table) <= self._data.limit:
            return table
        order = rng.generator(self._job.seed, "limit", part, site).permutation(len(table))
        return table.take(np.sort(order[: self._data.limit]))

    def _resolve(self, spec: Spec, split: str) -> list[Input]:
        items = [spec] if isinstance(spec, str) else spec
        try:
            return [each for item in items for each in self._find(item, split)]
        except OSError as error:
            raise DataError(f"{error.filename} can't be read: {error.strerror}.") from None

    def _find(self, item: str, split: str) -> list[Input]:
        path = self._job.path(item)
        if self._data.format == "hub":
            return [self._hub(item, split)]
        if path.exists():
            return self._at(path, split)
        name, _, named = item.rpartition(":")
        if name and _is_saved_dataset(self._job.path(name)):
            return self._at(self._job.path(name), named)
        if any(sign in item for sign in "*?["):
            root = Path(path.anchor) if path.is_absolute() else Path()
            pattern = path.relative_to(path.anchor) if path.is_absolute() else path
            found = _some(sorted(root.glob(str(pattern))), path)
            return [each for match in found for each in self._at(match, split)]
        raise DataError(_absent(item, path))

    def _hub(self, item: str, split: str) -> Input:
        name, _, named = item.partition(":")
        name, _, config = name.partition("@")
        folder = self._job.path(name)
        where = str(folder) if folder.is_dir() else name
        return Input(Path(name).name, lambda: tables.hub_dataset(where, config or None, named or split))

    def _at(self, path: Path, split: str) -> list[Input]:
        kind = self._data.format
        if path.is_file():
            return [self._file(path)]
        if kind == "arrow" or (kind is None and _is_saved_dataset(path)):
            return [Input(path.name, lambda: tables.saved_dataset(path, split))]
        if kind == "images" or (kind is None and _is_image_folder(path)):
            return [Input(path.name, lambda: tables.read(path, "images"))]
        files = sorted(each for each in path.iterdir() if each.is_file() and (kind or _kind(each)))
        return [self._file(each) for each in _some(files, path)]

    def _file(self, path: Path) -> Input:
        kind = self._data.format or _kind(path)
        if kind is None:
            raise DataError(
                f"{path}: its suffix does not tell its format. Set data.format (known suffixes: "
                f"{', '.join(tables.SUFFIXES)}, each also with .gz)."
            )
        if kind in ("arrow", "images"):
            raise DataError(f"{path} is a file; data of format {kind!r} are a folder. Give the folder, or data.format.")
        return Input(tables.stem_of(path), lambda: tables.read(path, kind, self._text_rows))


def _kind(path: Path) -> str | None:
    return tables.SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _is_image_folder(path: Path) -> bool:
    folders = (each for each in path.iterdir() if each.is_dir())
    return any(file.suffix.lower() in tables.IMAGE_SUFFIXES for folder in folders for file in folder.iterdir())


def _some(files: list[Path], path: Path) -> list[Path]:
    if not files:
        raise DataError(f"{path} matches no file that can be read. Check the path and data.format.")
    return files


def _absent(item: str, path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    gone = path.relative_to(folder).parts[0]
    hint = nearest(gone, (each.name for each in folder.iterdir()))
    hub = "" if Path(item).is_absolute() or _kind(path) else " For a data set on the hub set data.format = 'hub'."
    return f"There is no {item!r}: the folder {folder} has no {gone!r}.{hint}{hub}"


def _shown(spec: Spec) -> str:
    return spec if isinstance(spec, str) else ", ".join(spec)


def texts(table: Table, role: str) -> list[str]:
    """Return a column of text; empty text is text.

    Raises:
        DataError: a value is missing or is no text; file and line are named.
    """
    values = table.column(role)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise _wrong(table, index, role, value, "text")
    return values


def word_lists(table: Table, role: str) -> list[list[str]]:
    """Return a column of lists of words.

    Raises:
        DataError: a value is no list of text; file and line are named.
    """
    values = table.column(role)
    for index, value in enumerate(values):
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
            raise _wrong(table, index, role, value, "a list of words")
    return values


def label_indices(table: Table, role: str, labels: Sequence[str]) -> list[int]:
    """Return a column of labels as indices into ``labels``; a whole number that is no label's name is an index.

    Raises:
        DataError: a value is not in the map; file, line and the nearest label are named.
    """
    known = {label: index for index, label in enumerate(labels)}
    return [label_index(table, i, value, known) for i, value in enumerate(table.column(role))]


def label_index(table: Table, index: int, value: Any, known: Mapping[str, int]) -> int:
    """Return the index of one label of row ``index``."""
    if isinstance(value, str | int | np.integer):
        name = str(value)
        if name in known:
            return known[name]
        if name.isdecimal() and int(name) < len(known):
            return int(name)
    shown = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
    raise DataError(
        f"{table.where(index)}: the label {value!r} is not in data.labels ({len(known)}: {shown})."
        f"{nearest(str(value), known)} Add it to data.labels or mend the row."
    )


def histogram(labels: Sequence[str], indices: Iterable[int]) -> dict[str, int]:
    """Return label -> count, for every label of the map."""
    counts = np.bincount(np.fromiter(indices, np.int64), minlength=len(labels))
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}


def _wrong(table: Table, index: int, role: str, value: Any, wanted: str) -> DataError:
    got = "nothing" if value is None or value in ("", []) else type(value).__name__
    return DataError(
        f"{table.where(index)}: {role!r} (column {table.aliases.get(role, role)!r}) must be {wanted}, it is {got}. "
        f"Mend the row, or set data.columns.{role} to another column."
    )
