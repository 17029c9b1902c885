# SPDX-License-Identifier: Apache-2.0
"""A folder of its own for each test of the command line, and the command line in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import shell


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hansa(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., shell.Result]:
    return lambda *words: shell.hansa(capsys, monkeypatch, *words)
