# SPDX-License-Identifier: Apache-2.0
"""Files that survive: in a folder, and over the real S3 protocol (``make test-s3``; moto is an imitation of S3)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import hypothesis.strategies as st
import obstore
import pytest
from hypothesis import given

from hansa.errors import StorageError, VersionError
from hansa.server.blobs import Blobs, Bucket, Folder, open_blobs
from hansa.server.settings import S3, ServerSettings

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Run an S3 server and return its address."""
    program = os.environ.get("HANSA_TEST_S3_SERVER") or shutil.which("moto_server")
    if program is None:
        pytest.skip("needs an S3 server: make test-s3, which installs moto's")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "Running on" in line:
                    break
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


_buckets = count()

Open = Callable[[Path], Blobs]
"""Opens the files of a server's folder; every folder of a test is backed by the same store."""


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Open:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    name = f"bucket{next(_buckets)}"
    with urllib.request.urlopen(urllib.request.Request(f"{s3}/{name}", method="PUT")):
        pass
    settings = ServerSettings(blobs=f"s3://{name}/fed one", s3=S3(endpoint=s3))
    return lambda directory: open_blobs(settings, directory)


@pytest.fixture(params=["folder", "bucket"])
def open_either(request: pytest.FixtureRequest) -> Open:
    if request.param == "folder":
        return lambda directory: open_blobs(ServerSettings(), directory)
    opened: Open = request.getfixturevalue("bucket")
    return opened


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Both


def test_a_file_is_kept_until_it_is_deleted(open_either: Open, tmp_path: Path) -> None:
    blobs = open_either(tmp_path)
    blobs.ping()
    write(tmp_path / "jobs/j/work/u 1.hansa", b"update")
    blobs.keep("jobs/j/work/u 1.hansa")
    blobs.keep("jobs/j/work/u 1.hansa")
    assert (
        blobs.fetch("jobs/j/work/u 1.hansa")
        == blobs.path("jobs/j/work/u 1.hansa")
        == tmp_path / "jobs/j/work/u 1.hansa"
    )
    for _ in range(2):
        blobs.delete("jobs/j/work/u 1.hansa")
    with pytest.raises(StorageError):
        blobs.fetch("jobs/j/work/u 1.hansa")
    assert not (tmp_path / "jobs/j/work/u 1.hansa").exists()


def test_what_is_not_there_can_not_be_kept(open_either: Open, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        open_either(tmp_path).keep("gone")


def test_a_folder_is_deleted_with_all_that_is_kept_of_it(open_either: Open, tmp_path: Path) -> None:
    blobs = open_either(tmp_path)
    for name in ("jobs/j/run.json", "jobs/j/work/u", "jobs/j2/run.json"):
        write(tmp_path / name, name.encode())
        blobs.keep(name)
    blobs.mirror("jobs/j")
    blobs.delete("jobs/j")
    assert files(tmp_path / "jobs") == {"j2/run.json": b"jobs/j2/run.json"}
    assert not blobs.restore("jobs/j")
    with pytest.raises(StorageError):
        blobs.fetch("jobs/j/work/u")
    assert blobs.fetch("jobs/j2/run.json").exists()


@given(
    st.text(max_size=30)
    | st.sampled_from(["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "a\0b", "x" * 2000])
)
def test_no_key_leaves_the_folder(key: str) -> None:
    folder = Path("/srv/hansa")
    try:
        path = Folder(folder).path(key)
    except StorageError:
        return
    assert path.is_relative_to(folder)
    assert ".." not in path.parts
    assert path != folder


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a\0b"])
def test_keys_that_leave_the_folder_are_refused(open_either: Open, tmp_path: Path, key: str) -> None:
    blobs = open_either(tmp_path)
    calls: list[Callable[[str], object]] = [blobs.keep, blobs.fetch, blobs.delete]
    if isinstance(blobs, Bucket):
        calls += [blobs.mirror, blobs.restore]
    for call in calls:
        with pytest.raises(StorageError, match="no path below"):
            call(key)


def test_all_that_leads_to_a_kept_file_is_synced_and_later_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    original = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), original(descriptor))
    )

    def inodes(*names: str) -> set[int]:
        return {(tmp_path / name).stat().st_ino for name in names}

    blobs = Folder(tmp_path)
    for name in ("jobs/j/u1", "jobs/j/u2", "jobs/k/u"):
        write(tmp_path / name, b"")
    blobs.keep("jobs/j/u1")
    assert set(synced) == inodes("jobs/j/u1", "jobs/j", "jobs", ".")
    synced.clear()
    blobs.keep("jobs/j/u2")
    assert set(synced) == inodes("jobs/j/u2", "jobs/j")
    synced.clear()
    blobs.keep("jobs/k/u")
    assert set(synced) == inodes("jobs/k/u", "jobs/k", "jobs")
    blobs.delete("jobs/j")
    write(tmp_path / "jobs/j/u1", b"")
    synced.clear()
    blobs.keep("jobs/j/u1")
    assert set(synced) == inodes("jobs/j/u1", "jobs/j", "jobs")


# The store


def test_small_files_are_put_at_once_and_large_ones_one_after_another(
    bucket: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each small one waits until all of them are on their way; of the large ones no two are."""
    small, large = ["u/1", "u/2", "u/3"], ["u/4", "u/5"]
    for key in (*small, *large):
        write(tmp_path / "one" / key, key.encode() * (2_000_000 if key in large else 1))
    all_at_once, alone, put = Barrier(len(small)), Lock(), obstore.put

    def waiting(store: Any, name: str, data: Path, **options: Any) -> Any:
        if name.removeprefix("kept/") in small:
            all_at_once.wait(timeout=60)
            return put(store, name, data, **options)
        assert alone.acquire(blocking=False)
        try:
            return put(store, name, data, **options)
        finally:
            alone.release()

    monkeypatch.setattr(obstore, "put", waiting)
    bucket(tmp_path / "one").keep(*small, *large)
    other = bucket(tmp_path / "other")
    for key in (*small, *large):
        assert other.fetch(key).read_bytes() == (tmp_path / "one" / key).read_bytes()


def test_of_files_that_are_put_at_once_one_that_fails_is_told(
    bucket: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def failing(store: Any, name: str, data: Path, **options: Any) -> Any:
        if name == "kept/u/2":
            raise OSError("refused")
        return put(store, name, data, **options)

    for key in ("u/1", "u/2", "u/3"):
        write(tmp_path / key, b"update")
    monkeypatch.setattr(obstore, "put", failing)
    with pytest.raises(StorageError, match="could not do it: refused"):
        bucket(tmp_path).keep("u/1", "u/2", "u/3")


def test_an_empty_disk_gets_its_files_back(bucket: Open, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    blobs = bucket(first)
    large = os.urandom(20 << 20)  # beyond one part
    write(first / "jobs/j/checkpoints/000001/model.safetensors", large)
    write(first / "jobs/j/checkpoints/.writing/half", b"not yet")
    write(first / "jobs/j/run.json", b"{}")
    write(first / "jobs/j/empty", b"")
    write(first / "jobs/j/ä #?%&+.txt", b"name")
    write(first / "jobs/j/.lock", b"")
    write(first / "jobs/j/work/updates/u.hansa", b"update")
    blobs.keep("jobs/j/work/updates/u.hansa")
    blobs.mirror("jobs/j")
    again = bucket(second)
    assert again.restore("jobs/j")
    assert files(second / "jobs/j") == {
        "checkpoints/000001/model.safetensors": large,
        "run.json": b"{}",
        "empty": b"",
        "ä #?%&+.txt": b"name",
    }
    assert again.fetch("jobs/j/work/updates/u.hansa").read_bytes() == b"update"
    write(second / "jobs/j/run.json", b"newer")
    assert not again.restore("jobs/j")
    assert (second / "jobs/j/run.json").read_bytes() == b"newer"
    assert not again.restore("jobs/other")


def test_only_what_changed_is_put_and_what_is_gone_is_deleted(bucket: Open, tmp_path: Path) -> None:
    blobs = bucket(tmp_path / "first")
    folder = tmp_path / "first/jobs/j"
    put: list[str] = []
    assert isinstance(blobs, Bucket)
    original = blobs._put
    blobs._put = lambda name, data: (put.append(name), original(name, data))[1]  # type: ignore[method-assign,func-returns-value]
    write(folder / "checkpoints/1/model", b"one")
    write(folder / "metrics.jsonl", b"1\n")
    blobs.mirror("jobs/j")
    assert len(put) == 3
    put.clear()
    shutil.rmtree(folder / "checkpoints/1")
    write(folder / "checkpoints/2/model", b"two")
    write(folder / "checkpoints/best", b"two")
    write(folder / "metrics.jsonl", b"2\n")
    blobs.mirror("jobs/j")
    assert len(put) == 3
    assert len(blobs._list("mirrors/jobs/j/")) == 3
    put.clear()
    bucket(tmp_path / "first").mirror("jobs/j")
    blobs.mirror("jobs/j")
    assert put == ["mirrors/jobs/j/manifest.json"]
    bucket(tmp_path / "second").restore("jobs/j")
    assert files(tmp_path / "second/jobs/j") == {
        "checkpoints/2/model": b"two",
        "checkpoints/best": b"two",
        "metrics.jsonl": b"2\n",
    }


class CutError(Exception):
    """The end of a server, at an inconvenient moment."""


def test_a_mirror_is_always_one_moment_of_its_folder(bucket: Open, tmp_path: Path) -> None:
    folder = tmp_path / "first/jobs/j"
    moments = [{f"f{n}": b"%d" % (moment * 10 + n * (moment > 0)) for n in range(3)} for moment in range(2)]
    for survive in range(6):
        blobs = bucket(tmp_path / "first")
        assert isinstance(blobs, Bucket)
        blobs.delete("jobs/j")
        for name, data in moments[0].items():
            write(folder / name, data)
        blobs.mirror("jobs/j")
        for name, data in moments[1].items():
            write(folder / name, data)
        calls = count()

        def cut(
            original: Callable[..., object], calls: Iterator[int] = calls, survive: int = survive
        ) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                if next(calls) >= survive:
                    raise CutError
                return original(*arguments)

            return call

        blobs._put = cut(blobs._put)  # type: ignore[method-assign,assignment]
        blobs._delete = cut(blobs._delete)  # type: ignore[method-assign,assignment]
        try:
            blobs.mirror("jobs/j")
        except CutError:
            assert survive < 5
        second = tmp_path / f"second{survive}"
        assert bucket(second).restore("jobs/j")
        assert files(second / "jobs/j") == moments[survive >= 4]


def test_a_damaged_mirror_is_not_restored_in_part(bucket: Open, tmp_path: Path) -> None:
    blobs = bucket(tmp_path / "first")
    assert isinstance(blobs, Bucket)
    for name in "abc":
        write(tmp_path / "first/jobs/j" / name, name.encode())
    blobs.mirror("jobs/j")
    contents = [name for name in blobs._list("mirrors/jobs/j/") if not name.endswith("manifest.json")]
    blobs._put(contents[1], b"?")
    second = bucket(tmp_path / "second")
    with pytest.raises(StorageError, match="damaged"):
        second.restore("jobs/j")
    assert not (tmp_path / "second/jobs/j").exists()
    blobs._delete([contents[1]])
    with pytest.raises(StorageError, match="404"):
        second.restore("jobs/j")
    hostile = b'{"format":1,"files":{"../../x":["%s",1]}}' % contents[0].rpartition("/")[2].encode()
    for manifest, error in ((b"{", StorageError), (b'{"format":2,"files":{}}', VersionError), (hostile, StorageError)):
        blobs._put("mirrors/jobs/j/manifest.json", manifest)
        with pytest.raises(error):
            second.restore("jobs/j")
    assert not (tmp_path / "second/jobs/j").exists()
    assert not (tmp_path / "x").exists()


def test_a_file_that_changes_meanwhile_is_read_again(bucket: Open, tmp_path: Path) -> None:
    blobs = bucket(tmp_path / "first")
    assert isinstance(blobs, Bucket)
    path = tmp_path / "first/jobs/j/log"
    write(path, b"1")
    original = blobs._put
    todo = [lambda: write(path, b"22"), lambda: write(path, b"333")]

    def put(name: str, data: Path | bytes) -> None:
        if todo and not name.endswith(".json"):
            todo.pop(0)()
        original(name, data)

    blobs._put = put  # type: ignore[method-assign]
    blobs.mirror("jobs/j")
    bucket(tmp_path / "second").restore("jobs/j")
    assert files(tmp_path / "second/jobs/j") == {"log": b"333"}


def test_a_store_that_is_not_there(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    write(tmp_path / "f", b"x")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for endpoint, bucket in ((nowhere, "b"), (s3, "no-such-bucket")):
            blobs = open_blobs(ServerSettings(blobs=f"s3://{bucket}", s3=S3(endpoint=endpoint)), tmp_path)
            for call in (blobs.ping, lambda blobs=blobs: blobs.keep("f"), lambda blobs=blobs: blobs.fetch("g")):
                with pytest.raises(StorageError, match=f"s3://{bucket}") as caught:
                    call()
                assert "\n" not in str(caught.value)
                assert "secret" not in str(caught.value)
