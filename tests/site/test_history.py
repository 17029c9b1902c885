# SPDX-License-Identifier: Apache-2.0
"""What a site remembers for good of what it has answered."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hansa.bundle import Bundle
from hansa.core import config
from hansa.errors import PolicyError, StorageError
from hansa.site.history import History
from hansa.transport.messages import Assignment
from members import members


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    lead = members(tmp_path / "federation").lead
    job = config.parse({"name": "toy", "recipe": "causal-lm"})
    return Bundle(job, lead.identity, {}, datetime.now(UTC))


def given(plan: str, kind: str = "train", course: str = "toy", round: int = 1) -> Assignment:
    return Assignment("t", "toy-1", "0" * 64, kind, course, round, plan, b"")  # type: ignore[arg-type]


def test_one_plan_a_round(tmp_path, bundle):
    for _ in range(2):  # the second time after a restart
        history = History(tmp_path / "history", bundle, "toy-1")
        history.check(given("a"))
        history.note(given("a"))
        history.check(given("a"))
        with pytest.raises(PolicyError, match="round 1 of 'toy'"):
            history.check(given("b"))
        for other in (given("b", kind="evaluate"), given("b", course="local.s0"), given("b", round=2)):
            history.check(other)


def test_a_plan_that_was_never_answered_may_be_replaced(tmp_path, bundle):
    history = History(tmp_path, bundle, "toy-1")
    history.check(given("a"))
    history.check(given("b"))


def test_one_id_for_what_was_signed(tmp_path, bundle):
    History(tmp_path / "history", bundle, "toy-1")
    with pytest.raises(PolicyError, match="knows it as toy-1"):
        History(tmp_path / "history", bundle, "toy-2")
    signed_again = Bundle(bundle.job, bundle.signer, bundle.files, datetime.now(UTC))
    History(tmp_path / "history", signed_again, "toy-2")


@pytest.mark.parametrize("tail", [b"", b'{"step":"tra', bytes(100)])
def test_a_line_that_was_cut_off_does_not_count(tmp_path, bundle, tail):
    folder = tmp_path / "history"
    History(folder, bundle, "toy-1").note(given("a"))
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes() + tail)
    History(folder, bundle, "toy-1").note(given("c", round=2))
    again = History(folder, bundle, "toy-1")
    for known in (given("b"), given("b", round=2)):
        with pytest.raises(PolicyError):
            again.check(known)


def test_a_damaged_history_is_said(tmp_path, bundle):
    folder = tmp_path / "history"
    History(folder, bundle, "toy-1")
    (path,) = folder.iterdir()
    path.write_bytes(b"rubbish\n")
    with pytest.raises(StorageError, match="damaged"):
        History(folder, bundle, "toy-1")
