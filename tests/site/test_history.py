# SPDX-License-Identifier: Apache-2.0
"""What a site remembers for good of what it has answered."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from hansa.bundle import Bundle
from hansa.core import config
from hansa.errors import PolicyError, StorageError
from hansa.site import history
from hansa.site.history import History
from hansa.transport.messages import Assignment
from members import members


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    lead = members(tmp_path / "federation").lead
    job = config.parse({"name": "toy", "recipe": "causal-lm"})
    return Bundle(job, lead.identity, {}, datetime.now(UTC))


def given(plan: str, kind: str = "train", course: str = "toy", round: int = 1, task: str = "t") -> Assignment:
    return Assignment(task, "toy-1", "0" * 64, kind, course, round, plan, b"")  # type: ignore[arg-type]


def test_one_plan_a_round(tmp_path, bundle):
    for _ in range(2):  # the second time after a restart
        history = History(tmp_path / "history", bundle, "toy-1")
        history.check(given("a"))
        note = history.note(given("a"))
        assert note.read_text().count('"plan":"a"') == 1
        history.check(given("a"))
        with pytest.raises(PolicyError, match="round 1 of 'toy'"):
            history.check(given("b"))
        for other in (given("b", kind="evaluate"), given("b", course="local.s0"), given("b", round=2)):
            history.check(other)


def test_a_round_whose_noise_is_drawn_anew_is_answered_once(tmp_path, bundle):
    """Killed before its answer was noted it is made again; later, by whatever plan, it is not. Evaluations are."""
    for _ in range(2):
        history = History(tmp_path / "history", bundle, "toy-1")
        history.check(given("a"), once=True)
    history.note(given("a"))
    for known in (history, History(tmp_path / "history", bundle, "toy-1")):
        with pytest.raises(PolicyError, match="would tell more than the job's privacy plan accounts for"):
            known.check(given("a"), once=True)
        known.check(given("a", round=2), once=True)
        known.check(given("a"))
        assert known.trained("toy") == {1}
        assert known.has(given("a"))
        for other in (given("b"), given("a", round=2), given("a", task="u")):
            assert not known.has(other)


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


def histories(folder):
    return {path.name for path in folder.glob("*.jsonl")}


def test_what_is_old_is_forgotten_and_never_done_over(tmp_path, bundle):
    """Jobs on the agenda are kept, whatever their age; a forgotten one is not taken up again, nor one as old."""
    folder, now = tmp_path / "history", datetime.now(UTC)
    made = {days: Bundle(bundle.job, bundle.signer, {}, now - timedelta(days=days)) for days in (1, 100, 150, 200)}
    for days, signed in made.items():
        History(folder, signed, f"toy-{days}").note(given("a"))
    history.prune(folder, {"toy-200"}, now)
    assert len(histories(folder)) == 2
    for id in ("toy-100", "toy-again"):
        with pytest.raises(PolicyError, match="Submit the job again"):
            History(folder, made[100], id)
    never_seen = Bundle(bundle.job, bundle.signer, {"a.csv": (1, "0" * 64)}, made[150].created)
    with pytest.raises(PolicyError, match="Submit the job again"):
        History(folder, never_seen, "toy-7")
    assert len(histories(folder)) == 2, "what was refused left nothing"
    for days in (1, 200):
        with pytest.raises(PolicyError, match="round 1"):
            History(folder, made[days], f"toy-{days}").check(given("b"))
    History(folder, bundle, "toy-new")
    history.prune(folder, (), now - timedelta(days=1000))
    assert len(histories(folder)) == 3


def test_there_are_no_more_histories_than_so_many(tmp_path, bundle, monkeypatch):
    monkeypatch.setattr(history, "MOST_KEPT", 2)
    now = datetime.now(UTC)
    made = [Bundle(bundle.job, bundle.signer, {}, now - timedelta(hours=hours)) for hours in (4, 3, 2, 1)]
    for number, signed in enumerate(made):
        History(tmp_path, signed, f"toy-{number}")
    history.prune(tmp_path, {"toy-0"}, now)
    assert len(histories(tmp_path)) == 3
    History(tmp_path, made[0], "toy-0")
    with pytest.raises(PolicyError, match="Submit the job again"):
        History(tmp_path, made[1], "toy-1")
    History(tmp_path, made[2], "toy-2")


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


def test_what_was_revealed_is_remembered_as_long_as_what_was_answered(tmp_path, bundle):
    """A job that leaves the agenda and comes back finds its states; they go with the history."""
    folder = tmp_path / "history"
    state = History(folder, bundle, "toy-1").secagg / "toy" / "s0.state"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"revealed")
    assert (History(folder, bundle, "toy-1").secagg / "toy" / "s0.state").read_bytes() == b"revealed"
    history.prune(folder, ["toy-1"], datetime.now(UTC) + timedelta(days=400))
    assert state.exists(), "the job is on the agenda"
    history.prune(folder, [], datetime.now(UTC) + timedelta(days=400))
    assert not state.parent.parent.exists()
