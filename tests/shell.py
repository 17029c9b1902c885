# SPDX-License-Identifier: Apache-2.0
"""Runs the command line: in this process where speed matters, as a process of its own where truth does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import toys
from hansa.cli import main as program

SETTINGS: dict[str, Any] = {
    "name": "toy",
    "rounds": 3,
    "recipe": {"name": "toys:build"},
    "train": {"optimizer": "sgd"},
    "baselines": {"base": True, "local": True},
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def job_file(folder: Path, **values: Any) -> str:
    """Write a job over the toy quadratics and return its name."""
    (folder / "job.json").write_text(json.dumps({**SETTINGS, **values}))
    return "job.json"


def hansa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """Run a command in this process."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["hansa", *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    out, err = capsys.readouterr()
    return Result(int(end.value.code or 0), out, err)


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(toys.__file__).parent), "OMP_NUM_THREADS": "1", **values}


def process(folder: Path, *words: str, prelude: str = "") -> Result:
    """Run a command as a process in ``folder``; ``prelude`` is Python that goes first."""
    code = f"{prelude}\nfrom hansa.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)
