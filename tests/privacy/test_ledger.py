# SPDX-License-Identifier: Apache-2.0
"""The ledger of a data set: what it adds up, what it refuses, what it notices, and what a crash leaves."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hansa.core import storage
from hansa.errors import AccessError, PolicyError, StorageError
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.ledger import Budget, Charge, Ledger, TamperedError

BUDGET = Budget(epsilon=3.0, delta=1e-6)
NOISY = Release(10.0, 0.01, 20)


def charge(task: str = "t1", release: Release = NOISY, job: str = "a" * 64, **values: Any) -> Charge:
    return Charge(
        **{
            "job": job,
            "id": "toy-0001",
            "task": task,
            "round": 1,
            "mechanism": "dp-sgd",
            "unit": "example",
            "release": release,
            **values,
        }
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path, "notes")


def fill(ledger: Ledger, count: int) -> None:
    for number in range(1, count + 1):
        ledger.charge(charge(f"t{number}"), BUDGET)


def test_charges_add_up_over_jobs(ledger: Ledger) -> None:
    assert ledger.read().spent(BUDGET) == 0
    releases = []
    for number, (job, release) in enumerate(
        [("a", NOISY), ("a", NOISY), ("b", Release(9.0)), ("c", Release(7.0, 0.1))]
    ):
        releases.append(release)
        ledger.charge(charge(f"t{number}", release, job), BUDGET)
    assert ledger.read().spent(BUDGET) == pytest.approx(epsilon(releases, 1e-6, "pld"), rel=1e-6)
    assert [entry.job for entry in ledger.read().entries] == ["a", "a", "b", "c"]


def test_without_sampling_the_sum_is_exact(ledger: Ledger) -> None:
    for number in range(25):
        ledger.charge(charge(f"t{number}", Release(10.0), unit="user", mechanism="local"), BUDGET)
    assert ledger.read().spent(BUDGET) == pytest.approx(epsilon([Release(2.0)], 1e-6), rel=1e-9)


def test_the_round_that_would_exceed_the_budget_is_refused_and_not_before(ledger: Ledger) -> None:
    allowed = 0
    while epsilon([Release(8.0, count=allowed + 1)], 1e-6) <= 3.0:
        ledger.charge(charge(f"t{allowed}", Release(8.0)), BUDGET)
        allowed += 1
    with pytest.raises(
        PolicyError, match=r"budget of 'notes' .* ε = 3 at δ = 1e-06, .* round 1 of toy-0001 would"
    ) as no:
        ledger.charge(charge(f"t{allowed}", Release(8.0)), BUDGET)
    releases = [Release(8.0, count=allowed)]
    assert allowed > 10
    assert f"{epsilon(releases, 1e-6):.4g} is spent" in no.value.message
    assert f"{epsilon([Release(8.0, count=allowed + 1)], 1e-6):.4g}" in no.value.message
    assert len(ledger.read().entries) == allowed
    ledger.charge(charge("small", Release(500.0)), BUDGET)
    ledger.charge(charge("t0", Release(8.0)), BUDGET)


def test_the_tighter_accountant_decides(ledger: Ledger) -> None:
    release = Release(1.0, 0.01, 1000)
    rdp, pld = (epsilon([release], 1e-5, accountant) for accountant in ("rdp", "pld"))
    with pytest.raises(PolicyError):
        ledger.charge(charge(release=release), Budget(epsilon=0.99 * pld, delta=1e-5))
    between = Budget(epsilon=(rdp + pld) / 2, delta=1e-5)
    assert ledger.charge(charge(release=release), between) == pytest.approx(pld)


def test_a_task_is_charged_once_until_its_update_may_have_left(ledger: Ledger) -> None:
    first = ledger.charge(charge(), BUDGET)
    assert ledger.charge(charge(), BUDGET) == first
    ledger.sent("a" * 64, "t2")
    assert ledger.charge(charge(), BUDGET) == first
    assert len(ledger.read().entries) == 1
    ledger.sent("a" * 64, "t1")
    second = ledger.charge(charge(), BUDGET)
    assert ledger.charge(charge(), BUDGET) == second > first
    for other in (charge("t2"), charge(job="b" * 64), charge(release=Release(11.0, 0.01, 20))):
        ledger.charge(other, BUDGET)
    assert len(ledger.read().entries) == 5
    assert ledger.read().spent(BUDGET) > second


def test_noise_for_examples_is_nothing_for_users(ledger: Ledger) -> None:
    users = Budget(epsilon=3.0, delta=1e-6, unit="user")
    ledger.charge(charge(release=Release(50.0), unit="user", mechanism="local"), users)
    with pytest.raises(PolicyError, match="'dp-sgd' hides one example, and the budget is for a user"):
        ledger.charge(charge("t2", Release(1e4)), users)
    ledger.charge(charge("t2", Release(50.0)), BUDGET)
    assert ledger.read().spent(users) == float("inf")


def test_each_data_set_has_its_own(tmp_path: Path) -> None:
    Ledger(tmp_path, "notes").charge(charge(), BUDGET)
    assert Ledger(tmp_path, "other").read().entries == []


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def change(number: int) -> Callable[[list[bytes]], list[bytes]]:
    def apply(before: list[bytes]) -> list[bytes]:
        after = list(before)
        after[number - 1] = after[number - 1].replace(b'"count":20', b'"count":10')
        return after

    return apply


def forged(before: list[bytes]) -> list[bytes]:
    """Change line 2 and make the chain good again behind it."""
    after, digest = [], hashlib.sha256().hexdigest()
    for line in change(2)(before):
        entry = json.loads(line)
        entry["before"] = digest
        after.append(json.dumps(entry).encode() + b"\n")
        digest = hashlib.sha256(after[-1]).hexdigest()
    return after


TAMPERED = [
    (change(1), "line 1 was changed"),
    (change(3), "line 3 was changed"),
    (change(5), "line 5 was changed"),
    (forged, "line 5 was changed"),
    (lambda a: [*a[:1], *a[2:]], "line 5 is missing"),
    (lambda a: [*a[:1], *a[2:], a[4]], "line 3 stands where line 2 was"),
    (lambda a: [a[0], a[2], a[1], a[3], a[4]], "line 3 stands where line 2 was"),
    (lambda a: a[:4], "line 5 is missing; 5 were written"),
    (lambda a: [*a[:4], a[4][:-9]], "line 5 is missing"),
    (lambda a: [], "line 1 is missing"),
    (lambda a: [*a, a[4], a[4]], "line 7 was added"),
    (lambda a: [*a[:2], b"\xff\x00\n", *a[3:]], "line 3 was changed: "),
    (lambda a: [*a[:2], b"[" * 100_000 + b"\n", *a[3:]], "line 3 was changed: "),
    (lambda a: [a[0].replace(b'"number":1', b'"extra":2,"number":1'), *a[1:]], "line 1 was changed: "),
    (lambda a: [a[0].replace(b"10.0", b"-1.0"), *a[1:]], "line 1 was changed: "),
]


@pytest.mark.parametrize(("tamper", "found"), TAMPERED)
def test_what_was_done_to_the_lines_is_named(
    ledger: Ledger, tmp_path: Path, tamper: Callable[[list[bytes]], list[bytes]], found: str
) -> None:
    fill(ledger, 5)
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b"".join(tamper(lines(path))))
    for read in (ledger.read, lambda: ledger.charge(charge("next"), BUDGET)):
        with pytest.raises(TamperedError, match=found):
            read()


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lambda folder: (folder / "notes.head").unlink(), "its head, notes.head, is gone"),
        (lambda folder: (folder / "notes.jsonl").unlink(), "line 1 is missing"),
        (lambda folder: (folder / "notes.head").write_bytes(b"{}"), "was changed: Object missing"),
        (lambda folder: (folder / "notes.head").write_bytes(b"\xff"), "was changed"),
        (lambda folder: (folder / "other.head").replace(folder / "notes.head"), "that of 'other'"),
    ],
)
def test_what_was_done_to_the_files_is_named(tmp_path: Path, tamper: Callable[[Path], object], found: str) -> None:
    fill(Ledger(tmp_path, "other"), 1)
    fill(Ledger(tmp_path, "notes"), 2)
    tamper(tmp_path)
    with pytest.raises(TamperedError, match=found):
        Ledger(tmp_path, "notes").read()


class Owner:
    """A seal whose key is a password."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, data: bytes) -> tuple[bytes, str]:
        return hashlib.sha256(self._key + data).digest(), "owner"

    def check(self, data: bytes, signature: bytes, certificate: str) -> None:
        if signature != self.sign(data)[0]:
            raise AccessError("another signature")


def test_a_consistent_forgery_needs_the_owners_key(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "true", "notes", Owner(b"key"))
    fill(ledger, 3)
    assert len(ledger.read().entries) == 3
    forger = Ledger(tmp_path / "false", "notes", Owner(b"guess"))
    fill(forger, 1)
    for name in ("notes.jsonl", "notes.head"):
        (tmp_path / "false" / name).replace(tmp_path / "true" / name)
    with pytest.raises(TamperedError, match="another signature"):
        ledger.read()


@pytest.mark.parametrize("tail", [b"", b'{"number":3,"be', bytes(200)])
def test_a_line_that_was_never_confirmed_is_written_over(ledger: Ledger, tmp_path: Path, tail: bytes) -> None:
    fill(ledger, 2)
    path = tmp_path / "notes.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert len(ledger.read().entries) == 2
    ledger.charge(charge("t3"), BUDGET)
    assert [entry.task for entry in ledger.read().entries] == ["t1", "t2", "t3"]


@pytest.mark.parametrize("filled", [0, 2])
@pytest.mark.parametrize("fails", ["write_atomic", "sync_directory"])
def test_a_charge_that_could_not_be_confirmed_is_none(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, filled: int, fails: str
) -> None:
    fill(ledger, filled)

    def full(*args: object) -> None:
        raise storage.full(Path("x"), OSError(28, "No space left on device"))

    with monkeypatch.context() as patched:
        patched.setattr(storage, fails, full)
        with pytest.raises(StorageError, match="No space left"):
            ledger.charge(charge("new"), BUDGET)
    assert len(ledger.read().entries) == filled
    ledger.charge(charge("new"), BUDGET)
    assert len(ledger.read().entries) == filled + 1


CHARGING = """
import sys
from pathlib import Path
from hansa.privacy.accounting import Release
from hansa.privacy.ledger import Budget, Charge, Ledger, TamperedError
folder, begun = Path(sys.argv[1]), int(sys.argv[2])
for number in range(begun, 10_000):
    asked = Charge("a" * 64, "toy", f"t{number}", number + 1, "local", "user", Release(1000.0))
    Ledger(folder, "notes").charge(asked, Budget(epsilon=9.0, delta=1e-6))
    print(number, flush=True)
"""


def test_a_process_that_is_killed_leaves_each_confirmed_charge_and_at_most_one_more(tmp_path: Path) -> None:
    confirmed = 0
    for stop in (1, 4, 9):
        with subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(tmp_path), str(confirmed)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for _ in range(stop):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            confirmed += stop + len(process.stdout.read().splitlines())
        tasks = [entry.task for entry in Ledger(tmp_path, "notes").read().entries]
        assert tasks == [f"t{number}" for number in range(len(tasks))]
        assert confirmed <= len(tasks) <= confirmed + 1


STEPS = (os, "fsync"), (Path, "replace"), (storage, "sync_directory")


def _crash(folder: Path, point: int, done: Any) -> None:
    """Charge three tasks, and be killed before the step ``point`` towards durability."""
    left = point

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        return call

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))
    for number in range(3):
        Ledger(folder, "notes").charge(charge(f"t{number}"), BUDGET)
        done.value = number + 1


def test_a_kill_before_any_step_loses_no_confirmed_charge(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for point in range(1, 100):
        folder, done = tmp_path / str(point), context.Value("i", 0)
        process = context.Process(target=_crash, args=(folder, point, done))
        process.start()
        process.join()
        tasks = [entry.task for entry in Ledger(folder, "notes").read().entries]
        assert tasks == [f"t{number}" for number in range(len(tasks))]
        assert done.value <= len(tasks) <= done.value + 1
        for number in range(3):
            Ledger(folder, "notes").charge(charge(f"t{number}"), BUDGET)
        assert [entry.task for entry in Ledger(folder, "notes").read().entries] == ["t0", "t1", "t2"]
        if process.exitcode == os.EX_OK:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 15 < point < 99


def _charge(folder: Path, name: str, barrier: Any) -> None:
    barrier.wait()
    for number in range(10):
        Ledger(folder, "notes").charge(charge(f"{name}{number}", Release(100.0)), BUDGET)


def test_processes_that_charge_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_charge, args=(tmp_path, name, barrier)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == os.EX_OK
    found = {entry.task for entry in Ledger(tmp_path, "notes").read().entries}
    assert found == {f"{name}{number}" for name in "ab" for number in range(10)}
