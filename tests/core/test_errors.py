# SPDX-License-Identifier: Apache-2.0
"""The exception tree is the one drawn at the top of errors.py, and exit codes are part of the interface."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from hansa import errors
from hansa.errors import HansaError, nearest

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
}


def drawn() -> dict[str, tuple[str, int]]:
    """Class -> (parent, exit code), read from the drawing."""
    found: dict[str, tuple[str, int]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│├└─ ]*)(\w+Error)\s+(\d+)\b", line)
        if match:
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            found[match[2]] = (path[-2] if depth else "Exception", int(match[3]))
    return found


def test_the_drawing_is_the_tree() -> None:
    assert len(drawn()) > 10
    assert drawn() == {name: (kind.__base__.__name__, kind.exit_code) for name, kind in CLASSES.items()}


def test_exit_codes_that_are_no_error() -> None:
    text = errors.__doc__ or ""
    assert f"{errors.SUCCESS} is success and {errors.DEFECT} a defect" in text
    codes = {kind.exit_code for kind in CLASSES.values()}
    assert errors.SUCCESS not in codes
    assert errors.DEFECT not in codes
    assert all(0 < code < 256 for code in codes)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_an_error_says_what_it_knows(kind: type[HansaError]) -> None:
    assert str(kind("It broke.")) == "It broke."
    assert str(kind("It broke.", site="riga")) == "site riga: It broke."
    assert str(kind("It broke.", job="j", site="riga", round=0)) == "job j, site riga, round 0: It broke."
    assert kind("It broke.", site="riga").message == "It broke."


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_an_error_crosses_processes_whole(kind: type[HansaError]) -> None:
    back = pickle.loads(pickle.dumps(kind("It broke.", job="j", site="riga", round=3)))
    assert type(back) is kind
    assert (back.message, back.job, back.site, back.round) == ("It broke.", "j", "riga", 3)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_every_error_has_one_line_of_documentation(kind: type[HansaError]) -> None:
    assert (kind.__doc__ or "").splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("fedvag", ["fedavg", "scaffold"], " Did you mean 'fedavg'?"),
        ("FedAvg", ["fedavg", "fedavgm"], " Did you mean 'fedavg'?"),
        ("LORA", ["lora"], " Did you mean 'lora'?"),
        ("xyz", ["fedavg"], ""),
        ("x", [], ""),
    ],
)
def test_nearest(word: str, known: list[str], expected: str) -> None:
    assert nearest(word, known) == expected
