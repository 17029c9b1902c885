# SPDX-License-Identifier: Apache-2.0
"""The databases that the server's tests run on: SQLite, and (``make test-postgres``) a PostgreSQL of their own."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from hansa.server.store import Store

SUPERUSER = "hansa"


def _program(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs; Debian keeps them off the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return shutil.which(name) or (str(versions[-1]) if versions else None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """Run a PostgreSQL server on a socket in a folder of its own, and return that folder."""
    initdb, ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or ctl is None:
        pytest.skip("needs a PostgreSQL server's programs (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="hansa-postgres-"))
    who: dict[str, object] = {}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        os.chown(folder, 65534, 65534)
        who = {"user": 65534, "group": 65534, "extra_groups": []}

    def run(*command: str) -> None:
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **who)  # type: ignore[call-overload]

    data, log = str(folder / "data"), str(folder / "log")
    try:
        run(initdb, "-D", data, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-instructions")
        run(ctl, "-D", data, "-l", log, "-w", "-o", f"-k {folder} -c listen_addresses=''", "start")
        try:
            yield folder
        finally:
            run(ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Database:
    """A database that nothing has been written to yet, and the folder of the server that uses it."""

    url: str | None
    directory: Path

    def open(self) -> Store:
        return Store.open(self.url, self.directory)

    def engine(self) -> sa.Engine:
        """Return a way to the database that bypasses the store."""
        url = self.url or f"sqlite:///{self.directory / 'hansa.db'}"
        return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


_numbers = itertools.count()


@pytest.fixture
def fresh_database(postgres: Path) -> str:
    """Make an empty database in PostgreSQL and return its URL."""
    admin = f"postgresql+psycopg://{SUPERUSER}@/{{}}?host={postgres}"
    name = f"test{next(_numbers)}"
    engine = sa.create_engine(admin.format("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return admin.format(name).replace("+psycopg", "")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    url = None if request.param == "sqlite" else str(request.getfixturevalue("fresh_database"))
    return Database(url, tmp_path)


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    store = database.open()
    yield store
    store.close()
