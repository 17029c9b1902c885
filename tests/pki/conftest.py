# SPDX-License-Identifier: Apache-2.0
"""Federations: one that a module's tests only read, and one of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from members import Members, members


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return members(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def own(tmp_path: Path) -> Members:
    return members(tmp_path / "own")
