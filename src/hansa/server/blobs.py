# SPDX-License-Identifier: Apache-2.0
"""The files that must survive: in the server's folder, and in an S3-compatible store if there is one.

A key is a file's path relative to the server's folder. With a store, a server that starts on an empty disk gets its
files back:

    PREFIX/kept/KEY                   what :meth:`Blobs.keep` was given: bundles, accepted updates
    PREFIX/mirrors/KEY/manifest.json  {"format", "files": {path: [digest, bytes]}} of the folder KEY
    PREFIX/mirrors/KEY/DIGEST         its files' contents, by their BLAKE3 digest

A manifest is written after the contents it names and before those that it no longer names are deleted, so a mirror is
always one moment of its folder, whole.

    case                                       what happens
    -----------------------------------------  ----------------------------------------------------------
    a key that leaves the folder               StorageError
    the store is down                          StorageError after some retries; nothing is acknowledged
    killed while mirroring                     the mirror is still the one before
    a file that changes while it is mirrored   it is read again
    a stored file that is damaged              StorageError; the folder is not restored in part
    a folder that is there already             it stays as it is: it is newer than its mirror
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from blake3 import blake3

from hansa.core import storage
from hansa.core import tree as trees
from hansa.errors import MissingExtraError, StorageError, VersionError
from hansa.server.settings import ServerSettings

if TYPE_CHECKING:
    from obstore.store import S3Store

FORMAT = 1

SKIPPED = ("work", ".lock")
"""What at the top of a folder is not mirrored: it is made again, or kept file by file."""

_PART_BYTES = 16 << 20
_MAX_PARTS = 10_000

_AT_ONCE = 8
"""How many small files are put at once; each is in memory, whole, meanwhile."""


class Blobs(Protocol):
    """Where files that must survive are. All methods block and may be called from any thread; StorageError."""

    def path(self, key: str) -> Path:
        """Return where the file ``key`` lies in the server's folder."""
        ...

    def keep(self, *keys: str) -> None:
        """Make files, which lie in the folder, durable; all are so when this returns, none need be if it raises."""
        ...

    def fetch(self, key: str) -> Path:
        """Return the path of the kept file ``key``, once it lies in the folder."""
        ...

    def delete(self, key: str) -> None:
        """Delete the file or folder ``key`` and all that is kept or mirrored of it; nothing happens if it is gone."""
        ...

    def mirror(self, key: str) -> None:
        """Make the folder ``key``, as it is now, durable."""
        ...

    def restore(self, key: str) -> bool:
        """Bring the mirrored folder ``key`` back if it is not there; say whether it was brought back."""
        ...

    def ping(self) -> None:
        """Raise StorageError if files can't be kept now."""
        ...


def open_blobs(settings: ServerSettings, directory: Path) -> Blobs:
    """Return the files of the server's folder ``directory``, as the settings keep them.

    Raises:
        MissingExtraError: the settings name an S3-compatible store, and its client is not installed.
        StorageError: the store's settings make no sense to its client.
    """
    folder = Folder(directory)
    return folder if settings.blobs is None else Bucket(folder, settings)


class Folder:
    """Files in a local folder, which is as durable as its disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._entered: set[Path] = set()  # folders whose own entries are durable since this process looked

    def path(self, key: str) -> Path:
        """Return where the file ``key`` lies."""
        return self.directory / _checked(key)

    def keep(self, *keys: str) -> None:
        """Sync the files and the entries that lead to them."""
        paths = {self.path(key) for key in keys}
        new: set[Path] = set()
        for path in paths:
            new.update(takewhile(lambda folder: folder not in (self.directory, *self._entered), path.parents))
        with _reported(self.directory):
            storage.sync({*paths, *(path.parent for path in paths), *(folder.parent for folder in new)})
        self._entered.update(new)

    def fetch(self, key: str) -> Path:
        """Return the file's path, if it is there."""
        path = self.path(key)
        if not path.is_file():
            raise StorageError(f"The file {path} is gone. Restore it, or abort its job.")
        return path

    def delete(self, key: str) -> None:
        """Delete the file or folder."""
        path = self.path(key)
        with _reported(path):
            if path.is_dir() and not path.is_symlink():
                self._entered = {folder for folder in self._entered if not folder.is_relative_to(path)}
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def mirror(self, key: str) -> None:
        """Nothing to do: whoever writes a run's folder makes it durable."""

    def restore(self, key: str) -> bool:
        """Nothing to do: there is no other place."""
        return False

    def ping(self) -> None:
        """Write and sync a small file."""
        storage.write_atomic(self.directory / ".ping", b"")


class Bucket:
    """Files in a local folder that are also put into an S3-compatible store."""

    def __init__(self, folder: Folder, settings: ServerSettings) -> None:
        try:
            from obstore import exceptions
            from obstore.store import S3Store
        except ModuleNotFoundError:
            raise MissingExtraError("An S3-compatible store needs its client: pip install 'hansa[s3]'.") from None
        self._folder = folder
        self._url = str(settings.blobs)
        given = {"endpoint": settings.s3.endpoint, "region": settings.s3.region}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        plain = (settings.s3.endpoint or os.environ.get("AWS_ENDPOINT_URL", "")).startswith("http://")
        try:
            self._store: S3Store = S3Store.from_url(
                self._url,
                client_options={"timeout": timedelta(minutes=5), "allow_http": plain},
                retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
                **options,
            )
        except (exceptions.BaseError, ValueError) as error:
            raise StorageError(f"The store {self._url} can't be used: {error}") from error
        # (inode, bytes, time) of a mirrored file -> its digest, so that only what changes is read again.
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def path(self, key: str) -> Path:
        """Return where the file ``key`` lies in the folder."""
        return self._folder.path(key)

    def keep(self, *keys: str) -> None:
        """Sync the files, then put them into the store: small ones some at once, as each waits for an answer."""
        self._folder.keep(*keys)
        with _reported(self._folder.directory):
            small = [key for key in keys if self.path(key).stat().st_size <= trees.LARGE]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for put in [threads.submit(self._keep, key) for key in small]:
                put.result()
        for key in keys:
            if key not in small:
                self._keep(key)

    def _keep(self, key: str) -> None:
        with _reported(self.path(key)):
            self._put(f"kept/{key}", self.path(key))

    def fetch(self, key: str) -> Path:
        """Get the file from the store if it is not in the folder."""
        path = self.path(key)
        if not path.is_file():
            self._get(f"kept/{key}", path)
        return path

    def delete(self, key: str) -> None:
        """Delete it from the store, then from the folder."""
        _checked(key)
        for place in (f"kept/{key}", f"mirrors/{key}"):
            self._delete([*self._list(f"{place}/"), place])
        self._folder.delete(key)

    def mirror(self, key: str) -> None:
        """Put what changed since the last time, then the manifest, then delete what it no longer names."""
        place = f"mirrors/{_checked(key)}"
        folder = self.path(key)
        stored = {name.rpartition("/")[2] for name in self._list(f"{place}/")} - {"manifest.json"}
        files: dict[str, tuple[str, int]] = {}
        with _reported(folder):
            for path in _walk(folder):
                entry = self._mirror_file(path, place, stored)
                if entry is not None:
                    files[path.relative_to(folder).as_posix()] = entry
        self._put(f"{place}/manifest.json", msgspec.json.encode(_Manifest(FORMAT, files)))
        needed = {digest for digest, _ in files.values()}
        self._delete([f"{place}/{digest}" for digest in stored - needed])

    def _mirror_file(self, path: Path, place: str, stored: set[str]) -> tuple[str, int] | None:
        """Put one file unless its contents are stored; return digest and bytes, or None if it is gone."""
        while True:
            try:
                before = _signature(path)
                known = self._digests.get(path)
                digest = known[1] if known is not None and known[0] == before else _digest(path)
                if digest not in stored:
                    self._put(f"{place}/{digest}", path)
                if _signature(path) == before:
                    break
            except FileNotFoundError:
                return None
        stored.add(digest)
        self._digests[path] = (before, digest)
        return digest, before[1]

    def restore(self, key: str) -> bool:
        """Get a mirrored folder, check it, and let it appear at once."""
        place = f"mirrors/{_checked(key)}"
        target = self.path(key)
        if target.exists() or f"{place}/manifest.json" not in self._list(f"{place}/"):
            return False
        temporary = target.with_name(f".{target.name}.restoring")
        with _reported(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            listing = temporary / "manifest.json"
            self._get(f"{place}/manifest.json", listing)
            manifest = _manifest(listing, self._url)
            listing.unlink()
            for name, (digest, size) in manifest.items():
                path = temporary / _checked(name)
                self._get(f"{place}/{digest}", path)
                if path.stat().st_size != size or _digest(path) != digest:
                    raise StorageError(f"{place}/{digest} in {self._url} is damaged. Restore a copy of the store.")
            storage.publish(temporary, target)
        return True

    def ping(self) -> None:
        """Write a small file to the folder, and one to the store."""
        self._folder.ping()
        self._put("ping", b"")

    def _put(self, name: str, data: Path | bytes) -> None:
        import obstore

        with self._talking():
            if isinstance(data, bytes):
                obstore.put(self._store, name, data)
            else:
                part = max(_PART_BYTES, -(-data.stat().st_size // _MAX_PARTS))
                obstore.put(self._store, name, data, chunk_size=part, max_concurrency=4)

    def _get(self, name: str, path: Path) -> None:
        import obstore

        temporary = path.with_name(f".{path.name}.fetching")
        with _reported(path), self._talking():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for chunk in obstore.get(self._store, name).stream(min_chunk_size=1 << 20):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            storage.sync_directory(path.parent)

    def _list(self, prefix: str) -> list[str]:
        import obstore

        with self._talking():
            return [str(item["path"]) for page in obstore.list(self._store, prefix) for item in page]

    def _delete(self, names: list[str]) -> None:
        import obstore

        with self._talking():
            for start in range(0, len(names), 1000):
                obstore.delete(self._store, names[start : start + 1000])

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (exceptions.BaseError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of this disk, not of the store
            cause = str(error).partition("\n")[0].partition(": <?xml")[0]
            raise StorageError(f"The store {self._url} could not do it: {cause}") from error


class _Manifest(msgspec.Struct):
    format: int
    files: dict[str, tuple[str, int]]


def _manifest(path: Path, url: str) -> Mapping[str, tuple[str, int]]:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"A manifest in {url} is damaged: {error}.") from error
    if manifest.format != FORMAT:
        raise VersionError(f"A manifest in {url} has format {manifest.format}; this release reads format {FORMAT}.")
    return manifest.files


def _checked(key: str) -> str:
    """Return ``key`` if it names a file below a folder and nothing else (StorageError)."""
    parts = key.split("/")
    if len(key.encode(errors="replace")) > 1000 or any(part in ("", ".", "..") for part in parts) or "\0" in key:
        raise StorageError(f"{key[:80]!r} is no path below the server's folder.")
    return key


def _walk(folder: Path) -> Iterator[Path]:
    """Yield a run's files that are to be mirrored: regular ones that are not on their way to another name."""
    for root, folders, names in os.walk(folder):
        here = Path(root)
        top = here == folder
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (top and name in SKIPPED))
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and not (top and name in SKIPPED) and path.is_file() and not path.is_symlink():
                yield path


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(path: Path) -> str:
    state = blake3()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Can't keep {error.filename or path}: {error.strerror or error}. "
            "Free some space, or check whom the folder belongs to."
        ) from error
