# SPDX-License-Identifier: Apache-2.0
"""Any order of asking, answering, forgetting and restarting keeps the first answer to every task."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hansa.server.store import Store, TaskRow

SITES = ("a", "b", "c")
ROUNDS = st.integers(1, 4)
PLANS = st.sampled_from(["1" * 64, "2" * 64])
WHO = st.lists(st.sampled_from(SITES), unique=True)


@dataclass(frozen=True)
class Known:
    """What must be true of a task."""

    task: str
    round: int
    site: str
    plan: str
    state: str = "open"
    answer: bytes = b""
    update: str = ""
    claimed: int | None = None


class Tasks(RuleBasedStateMachine):
    """The store beside a plain model of it."""

    names = Bundle("names")

    def __init__(self, url: str | None, job: str) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._url = url
        self._job = job
        self._answers = itertools.count()
        self.store = Store.open(url, Path(self._folder.name))
        self.store.add_job(job, "demo", "ann", "c" * 64, job, 4)
        self.store.set_state(job, "running")
        self.running = True
        self.known: dict[str, Known] = {}

    def teardown(self) -> None:
        if self.running:
            self.store.set_state(self._job, "aborted")
        self.store.delete_job(self._job)
        self.store.close()
        self._folder.cleanup()

    def _set(self, task: str, **changes: Any) -> None:
        self.known[task] = replace(self.known[task], **changes)

    def _current(self, round: int, site: str) -> Known | None:
        found = [k for k in self.known.values() if (k.round, k.site) == (round, site) and k.state != "replaced"]
        assert len(found) <= 1
        return found[0] if found else None

    @rule(target=names, round=ROUNDS, plan=PLANS, sites=WHO)
    def ask(self, round: int, plan: str, sites: list[str]) -> Any:
        rows = self.store.open_tasks(self._job, "demo", round, "train", plan, sites)
        assert list(rows) == sites
        for site, row in rows.items():
            before = self._current(round, site)
            if before is not None and before.plan == plan:
                assert row.task == before.task
            else:
                if before is not None:
                    self._set(before.task, state="replaced")
                assert row.task not in self.known
                self.known[row.task] = Known(row.task, round, site, plan)
        return multiple(*(row.task for row in rows.values()))

    @rule(task=names, kind=st.sampled_from(["done", "done", "missing", "late"]), site=st.sampled_from(SITES))
    def answer(self, task: str, kind: Any, site: str) -> None:
        number = next(self._answers)
        body, update = b"%d" % number, f"up/{number}" if kind == "done" else ""
        counted = self.store.answer(task, site, kind, body, update)
        before = self.known.get(task)
        expected = (
            before is not None
            and before.site == site
            and (before.state, kind)
            in {
                ("open", "done"),
                ("open", "missing"),
                ("open", "late"),
                ("late", "done"),
                ("late", "missing"),
            }
        )
        assert counted == expected
        if before is not None and expected:
            after = "overdue" if (before.state, kind) == ("late", "done") else kind
            self._set(task, state=after, answer=body, update=update)

    @rule(round=ROUNDS)
    def use_what_is_overdue(self, round: int) -> None:
        for known in list(self.known.values()):
            if known.state == "overdue" and known.claimed is None:
                self._set(known.task, claimed=round)
        expected = {k.task for k in self.known.values() if k.state == "overdue" and k.claimed == round}
        assert {row.task for row in self.store.overdue(self._job, "demo", round)} == expected

    @rule(before=ROUNDS)
    def forget(self, before: int) -> None:
        past = {
            known.task: known
            for known in self.known.values()
            if (known.round < before and known.state not in ("late", "overdue"))
            or (known.state == "overdue" and known.claimed is not None and known.claimed < before)
        }
        keys = self.store.forget(self._job, "demo", before)
        assert sorted(keys) == sorted(known.update for known in past.values() if known.update)
        for task in past:
            del self.known[task]

    @precondition(lambda self: self.running)
    @rule()
    def fail_and_go_on(self) -> None:
        self.store.set_state(self._job, "failed", "x")
        self.store.set_state(self._job, "queued")
        self.store.set_state(self._job, "running")
        for known in list(self.known.values()):
            if known.state in ("missing", "late"):
                self._set(known.task, state="replaced")

    @rule()
    def stop_or_go_on(self) -> None:
        if self.running:
            self.store.set_state(self._job, "aborted")
        else:
            self.store.set_state(self._job, "queued")
            self.store.set_state(self._job, "running")
            for known in list(self.known.values()):
                if known.state in ("missing", "late"):
                    self._set(known.task, state="replaced")
        self.running = not self.running

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store.open(self._url, Path(self._folder.name))

    @invariant()
    def every_task_is_as_it_must_be(self) -> None:
        for task, known in self.known.items():
            assert _seen(self.store.task(task)) == known
        listed = {row.task for row in self.store.tasks(self._job)}
        assert listed == {known.task for known in self.known.values() if known.state != "replaced"}
        for site in SITES:
            asked = {k.task for k in self.known.values() if k.site == site and k.state in ("open", "late")}
            assert {row.task for row in self.store.agenda(site)} == (asked if self.running else set())


def _seen(row: TaskRow | None) -> Known | None:
    if row is None:
        return None
    return Known(row.task, row.round, row.site, row.plan, row.state, row.answer, row.update, row.claimed)


def test_any_order_keeps_the_first_answer() -> None:
    jobs = itertools.count()
    run_state_machine_as_test(
        lambda: Tasks(None, f"j{next(jobs)}"), settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )


@pytest.mark.postgres
def test_any_order_keeps_the_first_answer_in_postgres(fresh_database: str) -> None:
    jobs = itertools.count()
    run_state_machine_as_test(
        lambda: Tasks(fresh_database, f"j{next(jobs)}"),
        settings=settings(max_examples=10, stateful_step_count=30, deadline=None),
    )
