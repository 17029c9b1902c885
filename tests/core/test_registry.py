# SPDX-License-Identifier: Apache-2.0
"""Names in a job file: each leads to something that can be built, and a wrong one ends in a clear message."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from hansa import registry
from hansa.errors import JobError, MissingExtraError
from hansa.registry import TABLES, build, checked, load, load_object, names

NAMES = [(family, name) for family, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_name_leads_to_something_that_can_be_built(family: str, name: str) -> None:
    builder = load(family, name)
    assert callable(builder)
    module, _, attribute = TABLES[family][name].partition(":")
    assert builder is getattr(sys.modules[module], attribute)
    assert builder.__doc__, "a builder says what it builds"


@pytest.mark.parametrize("family", ["strategies", "filters", "partitions"])
def test_the_tables_hold_every_public_builder(family: str) -> None:
    """A file in the folder whose builder nobody can name would be dead code."""
    package = {"partitions": "partition"}.get(family, family)
    folder = Path(registry.__file__).parent / package
    homes = {target.partition(":")[0].rpartition(".")[2] for target in TABLES[family].values()}
    inner = {"filters": {"weigh"}, "partitions": {"rows"}}.get(family, set())  # not for job files
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} - inner == homes


def test_names_in_a_table_are_lower_case() -> None:
    for _, name in NAMES:
        assert name == name.lower()


@pytest.mark.parametrize(
    ("family", "name", "meant"), [("strategies", "fedavgg", "fedavg"), ("filters", "Clip", "clip")]
)
def test_an_unknown_name_suggests_the_nearest_and_lists_all(family: str, name: str, meant: str) -> None:
    with pytest.raises(JobError) as caught:
        load(family, name)
    assert f"Did you mean {meant!r}?" in str(caught.value)
    for known in TABLES[family]:
        assert known in str(caught.value)


def test_own_code_is_named_as_module_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_filter_here.py").write_text("def mine(size: int = 3):\n    return size\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build("filters", "own_filter_here:mine", {"size": 5}) == 5
    with pytest.raises(JobError, match=r"has no 'mien'. Did you mean 'mine'\?"):
        load("filters", "own_filter_here:mien")
    with pytest.raises(JobError, match="it can't be called"):
        load("filters", "own_filter_here:number")


@pytest.mark.parametrize(
    "target", ["", ":", "a:", ":b", "a..b:c", ".a:b", "a:b:c", "a/b:c", "no_such_module_here:x", "hansa.nothing:x"]
)
def test_a_target_that_leads_nowhere_is_a_job_error(target: str) -> None:
    with pytest.raises(JobError):
        load_object(target)
    with pytest.raises(JobError):
        load("filters", target)


@pytest.mark.parametrize(
    "text", ["import no_such_module_here", "from hansa.errors import Nothing", "def broken(:"], ids=str
)
def test_own_code_that_cannot_be_imported_is_a_job_error(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_filter_here.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobError, match="'broken_filter_here:mine' can't be imported"):
        load("filters", "broken_filter_here:mine")


def test_a_missing_optional_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_tensorboard.py").write_text("import tensorboard.compat")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"pip install 'hansa\[tensorboard\]'") as caught:
        load_object("needs_tensorboard:x")
    assert caught.value.exit_code == 9


def test_every_extra_that_is_named_exists() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(registry._EXTRAS.values()) <= set(extras)


def test_third_parties_add_names_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("theirs", "hansa.core.rng:derive", "hansa.filters")
    clash = importlib.metadata.EntryPoint("clip", "hansa.core.rng:derive", "hansa.filters")

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point, clash] if group == "hansa.filters" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert names("filters") == sorted([*TABLES["filters"], "theirs"])
    assert load("filters", "theirs").__name__ == "derive"
    assert load("filters", "clip").__module__ == "hansa.filters.clip", "a known name keeps its meaning"
    with pytest.raises(JobError, match="theirs"):
        load("filters", "thiers")


# --- options -------------------------------------------------------------------------------------------------


def builder(size: int, rate: float = 0.5, kind: Literal["a", "b"] = "a", *, tags: list[str] | None = None) -> Any:
    return size, rate, kind, tags


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 3}, (3, 0.5, "a", None)),
        ({"size": "3", "rate": 1}, (3, 1.0, "a", None)),
        ({"size": 3, "kind": "b", "tags": ["x"]}, (3, 0.5, "b", ["x"])),
    ],
)
def test_options_are_turned_into_what_the_builder_takes(options: dict[str, Any], expected: Any) -> None:
    got = builder(**checked("filters.own", builder, options))
    assert got == expected
    assert [type(item) for item in got] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "filters.own needs the option 'size'."),
        (
            {"size": 3, "rtae": 1},
            "filters.own has no option 'rtae'; it has: size, rate, kind, tags. Did you mean",
        ),
        ({"size": "big"}, "filters.own.size: Input should be a valid integer"),
        ({"size": 1.5}, "filters.own.size: Input should be a valid integer"),
        ({"size": None}, "filters.own.size: Input should be a valid integer"),
        ({"size": 3, "kind": "c"}, "filters.own.kind: Input should be 'a' or 'b' (got 'c')."),
        ({"size": 3, "tags": "x"}, "filters.own.tags: Input should be a valid list (got 'x')."),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(JobError) as caught:
        checked("filters.own", builder, options)
    assert str(caught.value).startswith(expected)


def test_a_builder_may_take_anything() -> None:
    def open_ended(size: int, *rest: int, **more: Any) -> Any:
        return size, rest, more

    assert checked("x", open_ended, {"size": "3", "other": [1]}) == {"size": 3, "other": [1]}
    with pytest.raises(JobError, match="needs the option 'size'"):
        checked("x", open_ended, {"rest": 3})
