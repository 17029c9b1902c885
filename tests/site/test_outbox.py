# SPDX-License-Identifier: Apache-2.0
"""Answers on their way: durable before they are there, and there until they are acknowledged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hansa.core import wire
from hansa.core.storage import Spares
from hansa.core.values import Update
from hansa.errors import StorageError
from hansa.site.outbox import Entry, Outbox, Outcome
from hansa.transport.messages import Missing

LOST = Outcome(missing=Missing("lost", "gone"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def opened(folder: Path) -> Outbox:
    return Outbox(folder, Spares(folder.with_name("spare")))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_update_is_there_when_it_and_its_notes_are_durable(folder, tmp_path, monkeypatch):
    """What a power cut could take is synced first; what a killed process leaves is whole or out of sight."""
    outbox = opened(folder)
    made, note = outbox.begin("t"), tmp_path / "note"
    made.write_bytes(b"update")
    note.write_bytes(b"said")
    before = {made.stat().st_ino, note.stat().st_ino}
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, (folder / "t.hansa").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    entry = outbox.finish("t", Outcome(), [note])
    assert {(inode, False) for inode in before} == set(synced[:2])
    assert synced[2:] == [(folder.stat().st_ino, True)]
    assert entry == outbox.find("t") == opened(folder).find("t") == Entry(Outcome(), folder / "t.hansa")
    assert entry.update.read_bytes() == b"update"


@pytest.mark.parametrize("bad", [0, 1])
def test_an_update_that_can_t_be_synced_or_noted_is_no_answer(folder, tmp_path, monkeypatch, bad):
    outbox = opened(folder)
    made, note = outbox.begin("t"), tmp_path / "note"
    for path in (made, note):
        path.write_bytes(b"x")
    number, fsync, failing = (made, note)[bad].stat().st_ino, os.fsync, True

    def failed(descriptor: int) -> None:
        if failing and os.fstat(descriptor).st_ino == number:
            raise OSError(errno.EIO, "the disk failed")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(StorageError, match="the disk failed"):
        outbox.finish("t", Outcome(), [note])
    assert outbox.find("t") is None
    failing = False
    assert outbox.finish("t", Outcome(), [note]) == outbox.find("t")


def test_what_was_being_made_when_the_agent_was_killed_is_no_answer(folder, monkeypatch):
    """An update that was kept is still there, and durable; it goes when its task is begun again or not wanted."""
    for again in (lambda outbox: outbox.begin("t"), lambda outbox: outbox.keep_only(["u"])):
        outbox = opened(folder)
        made = outbox.begin("t")
        assert not outbox.kept("t")
        made.write_bytes(b"update")
        synced: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda descriptor, said=synced: said.append(os.fstat(descriptor).st_ino))
            outbox.keep("t")
        assert synced == [made.stat().st_ino, folder.stat().st_ino]
        (folder / ".v.msgpack.tmp").write_bytes(b"half")
        outbox = opened(folder)
        assert outbox.find("t") is None
        assert outbox.kept("t")
        assert names(folder) == {".t.hansa"}
        again(outbox)
        assert not outbox.kept("t")


def test_an_answer_without_an_update(folder):
    outbox = opened(folder)
    outbox.begin("a.b").write_bytes(b"half")
    entry = outbox.finish("a.b", LOST)
    assert names(folder) == {"a.b.msgpack"}
    assert entry == opened(folder).find("a.b") == Entry(LOST, None)


def test_an_answer_is_kept_until_it_is_acknowledged_or_not_wanted(folder):
    outbox = opened(folder)
    for task in ("one", "two", "a.b"):
        outbox.begin(task).write_bytes(b"update")
        outbox.finish(task, Outcome())
    outbox.finish("said", LOST)
    making = outbox.begin("at.work")
    making.write_bytes(b"half")
    outbox.acknowledged("one")
    outbox.acknowledged("one")
    outbox.keep_only(["a.b", "at.work"])
    assert names(folder) == {"a.b.hansa", ".at.work.hansa"}
    outbox.keep_only(["a.b"])
    assert not making.exists()


def test_a_large_update_is_written_over_once_it_is_acknowledged(folder):
    outbox = opened(folder)
    made = outbox.begin("t")
    made.write_bytes(bytes(1 << 20))
    number = made.stat().st_ino
    outbox.finish("t", Outcome())
    outbox.acknowledged("t")
    spares = Spares(folder.with_name("spare"))
    assert spares.take(outbox.begin("next"))
    assert (folder / ".next.hansa").stat().st_ino == number


def test_an_answer_that_a_disk_has_damaged(folder):
    outbox = opened(folder)
    outbox.finish("t", LOST)
    (folder / "t.msgpack").write_bytes(b"\xc1")
    with pytest.raises(StorageError, match="can't be read"):
        outbox.find("t")


@pytest.mark.parametrize("outcome", [Outcome(), LOST])
def test_an_answer_whose_folder_was_not_synced_is_none_until_it_is(folder, monkeypatch, outcome):
    """It has its name already, which a power cut could still take: a retry and a restart sync the folder first."""
    outbox = opened(folder)
    outbox.begin("t").write_bytes(b"update")
    number, fsync, failing, synced = folder.stat().st_ino, os.fsync, True, []

    def failed(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == number:
            if failing:
                raise OSError(errno.EIO, "the disk failed")
            synced.append(number)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(StorageError, match="the disk failed"):
        outbox.finish("t", outcome)
    assert len(names(folder)) == 1
    for again in (outbox, opened(folder)):
        failing = True
        with pytest.raises(StorageError, match="the disk failed"):
            again.find("t")
        failing = False
        assert again.find("t").outcome == again.find("t").outcome == outcome
    assert len(synced) == 2, "once each"


def test_what_is_no_answer_of_this_release_is_named_in_the_log(folder, caplog):
    outbox = opened(folder)
    wire.spool(Update("s", 1, 0, {}, 1.0, {}), outbox.begin("sound"))
    outbox.finish("sound", Outcome())
    outbox.finish("said", LOST)
    opened(folder)
    assert not caplog.records
    (folder / "old.json").write_bytes(b"{}")
    (folder / "damaged.msgpack").write_bytes(b"\xc1")
    data = bytearray((folder / "sound.hansa").read_bytes())
    data[6] += 1  # the format's version
    (folder / "foreign.hansa").write_bytes(data)
    outbox = opened(folder)
    told = {record.args[0].name: record.getMessage() for record in caplog.records}
    assert told.keys() == {"old.json", "damaged.msgpack", "foreign.hansa"}
    assert "wire format 4" in told["foreign.hansa"]
    assert names(folder) >= told.keys(), "they are named, not deleted"
