# SPDX-License-Identifier: Apache-2.0
"""The signed bundle in which a job travels: what it says, and the files that its submitter's code needs.

    bundle.json       {"format", "job", "files": {name: [bytes, blake3]}, "created"}
    signature         ECDSA P-256 / SHA-256 over the bytes of bundle.json, by the submitter's key
    certificate.pem   whose key that is; the federation's roster says whether he may submit
    files/NAME        stored, never compressed

It is a ZIP file so that anyone can look into it. A reader trusts none of it before the signature is checked, and no
file before its hash is. The signer's certificate must have been valid when he says that he signed, and must not have
been revoked since; that this was a moment ago is what the server checks when a job is submitted.

| case | result |
|---|---|
| a name with "..", an absolute one, a link, a compressed entry | WireError |
| a file that is missing, extra, of another length or hash | WireError, ChecksumError |
| signed by somebody unknown, revoked, or whose role may not submit | AccessError |
| a file that the job names lies outside the job's folder | JobError when the bundle is made |
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import blake3
import msgspec

from hansa.core import config, storage
from hansa.core.config import Job
from hansa.errors import ChecksumError, HansaError, JobError, StorageError, VersionError, WireError
from hansa.pki.identity import Identity
from hansa.pki.kit import Kit, verify
from hansa.pki.roles import Permission, allowed
from hansa.pki.roster import Roster

FORMAT = 1
MAX_FILES = 10_000
MAX_HEAD_BYTES = 16 << 20

_BLOCK = 1 << 20
_HEAD, _SIGNATURE, _CERTIFICATE, _FILES = "bundle.json", "signature", "certificate.pem", "files/"


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    job: dict[str, Any]
    files: dict[str, tuple[int, str]]
    created: datetime


@dataclass(frozen=True)
class Bundle:
    """A bundle whose signature was checked.

    Attributes:
        job: the job as it was signed; its directory is where the files are put by :func:`unpack`.
        signer: who submitted it.
        files: name -> bytes and BLAKE3 hash.
        created: when it was signed, as the signer says.
    """

    job: Job
    signer: Identity
    files: Mapping[str, tuple[int, str]]
    created: datetime

    @property
    def brings_code(self) -> bool:
        """Whether code of the submitter's own would run at the sites."""
        job = self.job
        named = [job.recipe.name, job.strategy.name, job.workflow.name, *(item.name for item in job.filters)]
        own = any(":" in name for name in named) or (job.model.factory or "").partition(":")[0].endswith(".py")
        return own or job.recipe.name == "script" or any(name.endswith(".py") for name in self.files)


def pack(job: Job, path: Path, kit: Kit) -> list[int]:
    """Write the bundle of ``job`` to ``path``, signed by the kit's key.

    Returns:
        the offsets at which the file is best cut for transfer, so that unchanged files have unchanged pieces.

    Raises:
        JobError: a file that the job names is missing or lies outside the job's folder.
        StorageError: the disk is full or the folder can't be written.
    """
    files = {name: _hashed(source) for name, source in _named_files(job).items()}
    values = job.model_dump(mode="json")
    values.pop("directory")
    head = msgspec.json.encode(_Head(FORMAT, values, files, datetime.now(UTC)))
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, data in ((_HEAD, head), (_SIGNATURE, kit.sign(head)), (_CERTIFICATE, kit.certificate_pem())):
                archive.writestr(zipfile.ZipInfo(name), data)
            cuts = [0]
            for name, source in sorted(_named_files(job).items()):
                entry = zipfile.ZipInfo(_FILES + name)
                entry.file_size = source.stat().st_size
                with archive.open(entry, "w", force_zip64=True) as target, source.open("rb") as file:
                    assert archive.fp is not None
                    begin = archive.fp.tell()
                    while block := file.read(_BLOCK):
                        target.write(block)
                    cuts += range(begin, begin + entry.file_size, _BLOCK)
    except OSError as error:
        raise storage.full(path, error) from error
    return [*cuts, path.stat().st_size]


def _named_files(job: Job) -> dict[str, Path]:
    """Return name -> path of everything that travels: what ``files`` names, the script, the factory."""
    root = job.path(".").resolve()
    wanted = list(job.files)
    script = job.recipe.options.get("path") if job.recipe.name == "script" else None
    if isinstance(script, str):
        wanted.append(script)
    if job.model.factory is not None:
        file, _, name = job.model.factory.rpartition(":")
        wanted.append(file if name.isidentifier() and file else job.model.factory)
    found: dict[str, Path] = {}
    for item in wanted:
        matches = sorted(root.glob(item)) if not Path(item).is_absolute() else [Path(item)]
        if not matches:
            raise JobError(f"The job names {item!r}, and there is no such file in {root}.")
        for match in matches:
            for path in sorted(p for p in match.rglob("*") if p.is_file()) if match.is_dir() else [match]:
                if not path.resolve().is_relative_to(root):
                    raise JobError(f"{str(path)!r} lies outside the job's folder {root}, so it can't travel with it.")
                if "__pycache__" not in path.parts:
                    found[path.resolve().relative_to(root).as_posix()] = path
    return found


def _hashed(path: Path) -> tuple[int, str]:
    state = blake3.blake3()
    size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                state.update(block)
                size += len(block)
    except OSError as error:
        raise JobError(f"Can't read {str(path)!r}, which travels with the job: {error.strerror}.") from error
    return size, state.hexdigest()


def read(path: Path, roster: Roster) -> Bundle:
    """Check a bundle's signature and return what it says; no file in it has been looked at.

    Raises:
        WireError: it is no well-formed bundle.
        AccessError: its signer may not submit jobs.
        JobError: the job in it is not valid.
    """
    with _opened(path) as archive:
        head_bytes, signature, certificate = (_small(archive, name) for name in (_HEAD, _SIGNATURE, _CERTIFICATE))
    try:
        head = msgspec.json.decode(head_bytes, type=_Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"The bundle's head is malformed: {error}.") from None
    signer = roster.admit(certificate, head.created)
    allowed(signer, Permission.SUBMIT)
    verify(head_bytes, signature, certificate)
    if head.format != FORMAT:
        raise VersionError(f"The bundle has format {head.format}; this release reads {FORMAT}.")
    if len(head.files) > MAX_FILES:
        raise WireError(f"The bundle holds {len(head.files)} files; at most {MAX_FILES} are read.")
    for name in head.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or "\0" in name or any(p in ("..", ".") for p in parts):
            raise WireError(f"The bundle names a file {name[:80]!r} that can't be put into a folder.")
    return Bundle(config.parse(head.job), signer, head.files, head.created)


def unpack(path: Path, bundle: Bundle, directory: Path) -> Job:
    """Put the bundle's files into ``directory``, each checked, and return the job with that as its folder.

    Raises:
        WireError, ChecksumError: a file is not what was signed.
        StorageError: the disk is full.
    """
    with _opened(path) as archive:
        there = {entry.filename: entry for entry in archive.infolist()}
        for name, (size, digest) in bundle.files.items():
            entry = there.get(_FILES + name)
            if entry is None or entry.file_size != size or entry.compress_type != zipfile.ZIP_STORED:
                raise WireError(f"The bundle's file {name[:80]!r} is not what was signed.")
            target = directory / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as file:
                    found = _copy(source, file, size)
            except OSError as error:
                raise storage.full(target, error) from error
            if found != digest:
                target.unlink()
                raise ChecksumError(f"The bundle's file {name[:80]!r} is not what was signed (its hash differs).")
    values = json.loads(bundle.job.to_json())
    return config.parse({**values, "directory": str(directory.absolute())})


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> str:
    state = blake3.blake3()
    left = size
    while left and (block := source.read(min(_BLOCK, left))):
        state.update(block)
        target.write(block)
        left -= len(block)
    return state.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except HansaError:
        raise
    except OSError as error:
        raise StorageError(f"Can't read the bundle {path}: {error.strerror}.") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WireError(f"{path.name} is no well-formed bundle: {error}.") from None


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise WireError(f"The bundle has no {name}.") from None
    if entry.file_size > MAX_HEAD_BYTES or entry.compress_type != zipfile.ZIP_STORED:
        raise WireError(f"The bundle's {name} is too large or compressed.")
    return archive.read(entry)
