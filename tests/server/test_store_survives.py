# SPDX-License-Identifier: Apache-2.0
"""What was acknowledged is there after any end: SIGKILL, a second server, a full, read-only or damaged disk."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hansa.errors import StorageError, VersionError
from hansa.server import schema
from hansa.server.store import Store

from .conftest import Database

SITES = 20

WRITER = f"""
    import sys
    from pathlib import Path
    from hansa.server.store import Store

    url, directory, begin = sys.argv[1] or None, Path(sys.argv[2]), int(sys.argv[3])
    store = Store.open(url, directory)
    print("open", flush=True)
    store.add_job("j", "demo", "ann", "c" * 64, "k", 1000)
    store.set_state("j", "running")
    sites = [f"s{{n}}" for n in range({SITES})]
    for round in range(begin, 10_000):
        tasks = store.open_tasks("j", "demo", round, "train", "p" * 64, sites)
        print("opened", round, flush=True)
        for site, row in tasks.items():
            store.answer(row.task, site, "done", site.encode(), f"up/{{round}}/{{site}}")
            print("answered", round, site, flush=True)
        number = store.event("j", "round", str(round))
        print("event", number, flush=True)
"""


@contextlib.contextmanager
def child(code: str, *arguments: str, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process of its own, which is killed at the end."""
    command = [*before, sys.executable, "-c", textwrap.dedent(code), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], count: int) -> list[list[str]]:
    """Return the next ``count`` lines that the process prints, as words."""
    assert process.stdout is not None
    found = [process.stdout.readline().split() for _ in range(count)]
    assert all(found), "the process ended early"
    return found


def test_what_was_acknowledged_outlives_sigkill(database: Database) -> None:
    seed = 20261121
    draw = random.Random(seed)
    acknowledged: list[list[str]] = []
    begin = 1
    for attempt in range(4):
        with child(WRITER, database.url or "", str(database.directory), str(begin)) as writer:
            acknowledged += lines(writer, draw.randrange(2, 120))
            writer.send_signal(signal.SIGKILL)
            assert writer.stdout is not None
            rest = writer.stdout.read().split("\n")[:-1]  # what it still said before it died counts as well
            acknowledged += [line.split() for line in rest]
        store = database.open()
        try:
            rows = store.tasks("j") if store.jobs() else []
            done = {(str(row.round), row.site) for row in rows if row.state == "done"}
            opened = [row.round for row in rows]
            numbers = {str(line.number) for line in store.events("j", limit=100_000)}
        finally:
            store.close()
        where = f"seed {seed}, attempt {attempt}"
        for kind, *what in acknowledged:
            if kind == "answered":
                assert (what[0], what[1]) in done, where
            elif kind == "event":
                assert what[0] in numbers, where
            elif kind == "opened":
                assert int(what[0]) in opened, where
        assert all(opened.count(round) == SITES for round in opened), where
        assert len(done) <= sum(kind == "answered" for kind, *_ in acknowledged) + attempt + 1, where
        begin = max(opened, default=0) + 1


def test_a_second_server_is_refused_until_the_first_is_gone(database: Database, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    url = database.url or f"sqlite:///{database.directory / 'hansa.db'}"
    with child(WRITER, database.url or "", str(database.directory), "1") as first:
        assert lines(first, 1) == [["open"]]
        with pytest.raises(StorageError, match="Another server is at work"):
            database.open()
        with pytest.raises(StorageError, match="Another server is at work"):
            Store.open(url, elsewhere)
        with contextlib.closing(Store.view(url, elsewhere)) as view:
            lines(first, 3)
            assert view.job("j").state == "running"
        first.kill()
        first.wait()
        with contextlib.closing(Store.open(url, elsewhere)) as store:
            assert store.job("j").state == "running"


def test_a_server_that_lost_its_database_to_another_writes_nothing(database: Database, tmp_path: Path) -> None:
    with contextlib.closing(database.open()) as first:
        first.add_job("j", "demo", "ann", "c" * 64, "k", 1)
        with database.engine().begin() as connection:  # what a second server does once it has the lock
            connection.execute(sa.update(schema.owner).values(token="other"))
        with pytest.raises(StorageError, match="taken over"):
            first.set_state("j", "running")
        assert first.job("j").state == "queued"


@pytest.mark.postgres
def test_a_server_whose_session_was_cut_can_be_taken_over_and_is_fenced(fresh_database: str, tmp_path: Path) -> None:
    database = Database(fresh_database, tmp_path)
    folder = tmp_path / "second"
    folder.mkdir()
    with contextlib.closing(database.open()) as first:
        first.add_job("j", "demo", "ann", "c" * 64, "k", 1)
        with database.engine().begin() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert first.set_state("j", "running").state == "running"  # a new session; nobody has taken over yet
        with contextlib.closing(Store.open(fresh_database, folder)) as second:
            with pytest.raises(StorageError, match="taken over"):
                first.event("j", "k", "t")
            second.event("j", "k", "t")
            assert len(second.events("j")) == 1


def test_looking_changes_nothing(database: Database) -> None:
    with pytest.raises(StorageError, match="no server's database"):
        Store.view(database.url, database.directory)
    assert list(database.directory.iterdir()) == []
    with contextlib.closing(database.open()) as store:
        store.audit("ann", "lead", "submit", "j", "ok")
    with contextlib.closing(Store.view(database.url, database.directory)) as view:
        assert [row.actor for row in view.audits()] == ["ann"]
        with pytest.raises(AssertionError):
            view.audit("x", "", "", "", "")


def test_nobody_changes_an_audit_entry(database: Database) -> None:
    with contextlib.closing(database.open()) as store:
        store.audit("ann", "lead", "submit", "j", "ok")
        for statement in ("UPDATE audits SET actor = 'bob'", "DELETE FROM audits"):
            with pytest.raises(sa.exc.DBAPIError, match="only ever added"), database.engine().begin() as connection:
                connection.exec_driver_sql(statement)
        assert [row.actor for row in store.audits()] == ["ann"]


# Migrations


def test_the_tables_are_those_that_the_code_knows(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database.open().close()
    with database.engine().connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        checks = sa.inspect(connection).get_check_constraints("tasks")
    assert all(f"'{state}'" in checks[0]["sqltext"] for state in schema.TASK_STATES)


def _revisions() -> list[str]:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    assert script.get_heads() == [schema.REVISION]
    return [revision.revision for revision in reversed(list(script.walk_revisions()))]


@pytest.mark.parametrize("revision", _revisions())
def test_from_every_revision_to_the_newest(database: Database, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    with database.engine().begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    with contextlib.closing(database.open()) as store:
        store.add_job("j", "demo", "ann", "c" * 64, "k", 1)
    with contextlib.closing(database.open()) as store:
        assert store.job("j").name == "demo"


def test_a_newer_schema_is_refused_and_left_as_it_is(database: Database) -> None:
    with contextlib.closing(database.open()) as store:
        store.add_job("j", "demo", "ann", "c" * 64, "k", 1)
    with database.engine().begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for attempt in (database.open, lambda: Store.view(database.url, database.directory)):
        with pytest.raises(VersionError, match="9999"):
            attempt()
    with database.engine().begin() as connection:
        assert connection.exec_driver_sql("SELECT id FROM jobs").scalars().all() == ["j"]
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{schema.REVISION}'")
    with contextlib.closing(database.open()) as store:
        assert store.job("j").state == "queued"


def test_a_migration_that_fails_leaves_an_empty_database(database: Database) -> None:
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE audits (number INTEGER)")  # in the way of the last but one table
    with pytest.raises(StorageError, match="audits"):
        database.open()
    with database.engine().begin() as connection:
        assert sa.inspect(connection).get_table_names() == ["audits"]
        connection.exec_driver_sql("DROP TABLE audits")
    database.open().close()


# Bad disks (SQLite)


def test_no_database_at_all(tmp_path: Path) -> None:
    (tmp_path / "hansa.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(StorageError, match="damaged"):
        Store.open(None, tmp_path)
    assert (tmp_path / "hansa.db").read_bytes() == b"this is no database" * 1000


def test_a_damaged_database(tmp_path: Path) -> None:
    with contextlib.closing(Store.open(None, tmp_path)) as store:
        store.add_job("j", "demo", "ann", "c" * 64, "k", 1)
        for number in range(500):
            store.event("j", "round", f"{number} " + "x" * 200)
    path = tmp_path / "hansa.db"
    data = bytearray(path.read_bytes())
    data[8192:-4096] = bytes(len(data) - 12288)
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        Store.open(None, tmp_path)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=name):
        Store.open(None, tmp_path / name)


def test_a_folder_in_place_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "hansa.db").mkdir()
    with pytest.raises(StorageError, match="unable to open"):
        Store.open(None, tmp_path)


def _needs_namespaces() -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs leave to mount a small file system (unshare -rm)")


ON_A_SMALL_DISK = """
    import subprocess, sys
    from pathlib import Path
    from hansa.errors import StorageError
    from hansa.server.store import Store

    directory = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
    (directory / "ballast").write_bytes(bytes(300_000))
    store = Store.open(None, directory)
    store.add_job("j", "demo", "ann", "c" * 64, "k", 1)
    kept = 0
    try:
        while True:
            store.event("j", "round", "x" * 1000)
            kept += 1
    except StorageError as error:
        print("full:", error)
    assert len(store.events("j")) == kept > 10
    store.ping()
    (directory / "ballast").unlink()
    store.event("j", "round", "y")
    store.close()
    store = Store.open(None, directory)
    assert len(store.events("j")) == kept + 1
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
    try:
        Store.open(None, directory)
    except StorageError as error:
        print("read-only:", error)
    print("end")
"""


def test_a_full_and_then_a_read_only_disk(tmp_path: Path) -> None:
    _needs_namespaces()
    with child(ON_A_SMALL_DISK, str(tmp_path), before=("unshare", "-rm")) as process:
        said, _ = process.communicate()
    assert said.splitlines()[-1] == "end", said
    assert "full: The database" in said
    assert "Free some space" in said
    assert "read-only: Can't lock" in said
