# SPDX-License-Identifier: Apache-2.0
"""``import hansa`` stays light; import-linter (in `make check`) holds the layers themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pandas",
    "pyarrow",
    "matplotlib",
    "PIL",
    "sklearn",
    "scipy",
    "tensorboard",
    "jinja2",
    "hypothesis",
    "pytest",
    "grpc",
    "ray",
    "sqlalchemy",
}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def bare() -> set[str]:
    return modules_after("")


def test_import_hansa_takes_few_modules(bare: set[str]) -> None:
    loaded = modules_after("import hansa") - bare
    assert "hansa" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & (HEAVY | {"numpy", "pydantic", "rich", "typer"})
    assert len(loaded) < 100


@pytest.mark.parametrize("code", ["import hansa\nhansa.Job, hansa.load", "import hansa.core.fold, hansa.core.storage"])
def test_the_core_needs_no_framework(code: str) -> None:
    assert not {name.partition(".")[0] for name in modules_after(code)} & HEAVY


@pytest.mark.parametrize("package", ["core", "strategies", "filters", "workflows", "partition"])
def test_no_module_of_a_light_package_imports_a_heavy_library(package: str) -> None:
    files = sorted((ROOT / "src" / "hansa" / package).glob("*.py"))
    names = [f"hansa.{package}.{path.stem}" for path in files if path.stem != "__init__"]
    assert names
    loaded = modules_after("import " + ", ".join(names))
    assert set(names) <= loaded
    assert not {name.partition(".")[0] for name in loaded} & HEAVY


def test_the_contracts_cover_every_package() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = contracts[0]["layers"]
    listed = {name.strip() for layer in layers for name in layer.split("|")}
    package = ROOT / "src" / "hansa"
    there = {path.name.removesuffix(".py") for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} == listed
    assert {"hansa.core", "hansa.strategies", "hansa.filters", "hansa.workflows"} <= set(contracts[1]["source_modules"])
