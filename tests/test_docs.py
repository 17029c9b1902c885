# SPDX-License-Identifier: Apache-2.0
"""What the docs name is there: tests, benchmarks and pages; and their tables are tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
TESTS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
THREATS = ROOT / "docs" / "threat-model.md"


def tables(text: str) -> list[list[str]]:
    """Return the rows of each block of lines that begin with a bar."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]*\btest_\w+\.py\b", text))
    missing = {name for name in named if not any(path == name or path.endswith(f"/{name}") for path in TESTS)}
    assert not missing, "no such tests"
    commands = set(re.findall(r"\bbenchmarks/\w+\.py\b", text))
    assert not {name for name in commands if not (ROOT / name).is_file()}
    links = set(re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text))
    assert not {link for link in links if not (page.parent / link).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_a_head_and_as_many_cells_in_each_row(page: Path) -> None:
    for block in tables(page.read_text(encoding="utf-8")):
        assert len(block) > 2, block
        assert re.fullmatch(r"[|:\- ]+", block[1]), block[:2]
        assert {len(cells(row)) for row in block} == {len(cells(block[0]))}, block


def test_every_promise_of_the_threat_model_says_what_shows_it() -> None:
    """A row with a promise names a test, a command or a claim in its last cell, unless trust alone holds it."""
    unshown = [
        row
        for block in tables(THREATS.read_text(encoding="utf-8"))
        for row in block[2:]
        if not cells(row)[-1] and not re.match(r"nothing|the sum, and nothing|neither|$", cells(row)[1])
    ]
    assert unshown == []
