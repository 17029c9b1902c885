# SPDX-License-Identifier: Apache-2.0
"""The signed bundle in which a job travels: what it says, and the files that its submitter's code needs.

    bundle.json       {"format", "job", "files": {name: [bytes, blake3]}, "created"}
    signature         ECDSA P-256 / SHA-256 over the bytes of bundle.json, by the submitter's key
    certificate.pem   whose key that is; the federation's roster says whether he may submit
    files/NAME        stored, never compressed

It is a ZIP file so that anyone can look into it. A reader trusts none of it before the signature is checked, and no
file before its hash is. The signer's certificate must have been valid when he says that he signed, and must not have
been revoked since; that this was a moment ago is what the server checks when a job is submitted.

The same job and files give the same pieces but for the first few, so a base model that travels with one job is not
sent again for the next (:mod:`hansa.transport.pieces`). Files are copied a block at a time, whatever their size.

| case | result |
|---|---|
| a name with "..", an absolute one, a file inside a file, a compressed entry | WireError |
| entries that are missing, extra, twice there, or lie over each other | WireError |
| a directory that claims millions of entries | WireError before it is read |
| a link, a mode, a comment, a time | not looked at: every entry becomes a plain file |
| a file of another length or hash than was signed | WireError, ChecksumError |
| signed by somebody unknown, revoked, or whose role may not submit | AccessError |
| a file that the job names lies outside the job's folder, or changes while it is packed | JobError, no bundle |
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import blake3
import msgspec

from hansa.core import config, storage
from hansa.core.config import Job
from hansa.errors import ChecksumError, HansaError, JobError, PolicyError, StorageError, VersionError, WireError
from hansa.pki.identity import Identity
from hansa.pki.kit import Kit, verify
from hansa.pki.roles import Permission, allowed
from hansa.pki.roster import Roster

FORMAT = 1
MAX_FILES = 10_000
MAX_HEAD_BYTES = 16 << 20
MAX_DIRECTORY_BYTES = 16 << 20
MAX_NAME_BYTES = 1024

DATA_SUFFIXES = frozenset(
    {".bmp", ".conll", ".csv", ".gif", ".jinja", ".jpeg", ".jpg", ".json", ".jsonl", ".md", ".model", ".npz"}
    | {".parquet", ".png", ".safetensors", ".tiff", ".toml", ".tsv", ".txt", ".vocab", ".webp", ".yaml", ".yml"}
)
"""Files that nothing in Hansa runs or unpickles. Whatever else travels with a job counts as code."""

_BLOCK = 1 << 20
_HEAD, _SIGNATURE, _CERTIFICATE, _FILES = "bundle.json", "signature", "certificate.pem", "files/"


_FAMILIES = ("recipe", "strategy", "workflow", "partition")
_DATA_NAMES = frozenset({"license", "notice", "readme", ".gitattributes", "merges"})
_EXECUTES = frozenset({"trust_remote_code", "auto_map", "auto_mapping", "custom_generate", "megatron_core"})
"""Keys by which transformers and peft are told to import code that a file or an option names."""


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    job: dict[str, Any]
    files: dict[str, tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]]]
    created: Annotated[datetime, msgspec.Meta(tz=True)]


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
    def digest(self) -> str:
        """The digest of what was signed, by whom and when; not of its ZIP file."""
        signed = (self.signer.name, self.created, self.job.name, sorted(self.files.items()))
        return blake3.blake3(msgspec.json.encode(signed)).hexdigest()

    @property
    def code(self) -> Mapping[str, str]:
        """What in the job is, or names, code that is not Hansa's own: where it stands -> what it is.

        ``module:attribute`` names code that a site has installed, or has not; all else travels with the job.
        """
        job = self.job
        found = {where: choice.name for where in _FAMILIES if (choice := getattr(job, where)) and ":" in choice.name}
        found |= {f"filters.{i}": item.name for i, item in enumerate(job.filters) if ":" in item.name}
        if job.recipe.name == "script":
            found["recipe"] = "script"
        if job.model.factory is not None and not job.model.factory.endswith(".safetensors"):
            found["model.factory"] = job.model.factory
        found |= {f"files.{name}": name for name in self.files if not _is_data(name)}
        return found | {where: where.rpartition(".")[2] for where in _executing(job.model_dump(mode="json"))}


def _is_data(name: str) -> bool:
    path = PurePosixPath(name.lower())
    return path.suffix in DATA_SUFFIXES or path.name in _DATA_NAMES or path.stem in _DATA_NAMES


def _executing(value: Any, where: str = "") -> Iterator[str]:
    """Yield the places in a job of keys that make a library import code."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        place = f"{where}.{key}" if where else str(key)
        if key in _EXECUTES and inner:
            yield place
        yield from _executing(inner, place)


def check_code(
    code: Mapping[str, str],
    signer: Identity,
    signers: Collection[str],
    installed: Mapping[str, Collection[str]],
    place: str,
) -> None:
    """Refuse code that a site or server has not installed and named itself, unless it trusts the signer's.

    Args:
        code: as in :attr:`Bundle.code`.
        signer: who signed the job.
        signers: whose own code may run.
        installed: strategy, filters, workflow, partition, recipe -> what anyone's job may name there.
        place: whose decision it is: ``site`` or ``server``.

    Raises:
        PolicyError: what the job brings, and whose code may run.
    """
    if signer.name in signers:
        return
    for where, what in code.items():
        if what not in installed.get(where.partition(".")[0], ()):
            raise PolicyError(
                f"The job brings code of its own ({where}: {what[:80]!r}), signed by {signer.name!r}. This {place} "
                f"runs code of: {', '.join(signers) or 'nobody'} (policy.signers in {place}.toml)."
            )


def localised_model(
    job: Job, models: Mapping[str, str], directory: Path, place: str, *, any_path: bool
) -> config.ModelSection:
    """Return the job's model section with own folders in place of names that are known, and no path out of the job's.

    Args:
        job: the signed job.
        models: what a job calls a model -> the folder where it lies here.
        directory: what relative paths in ``models`` are relative to.
        place: whose disk it is: ``site`` or ``server``.
        any_path: whether the job may name any path.

    Raises:
        PolicyError: the job names a path that is not its own.
    """
    changes: dict[str, str] = {}
    for key in ("base", "tokenizer", "factory"):
        name = getattr(job.model, key)
        if name is None:
            continue
        if key != "factory" and name in models:
            changes[key] = in_folder(models[name], directory)
        elif not any_path:
            _check_inside(f"model.{key}", name, models, place)
    script = job.recipe.options.get("path") if job.recipe.name == "script" else None
    if isinstance(script, str) and not any_path:
        _check_inside("recipe.path", script, (), place)
    return job.model.model_copy(update=changes)


def _check_inside(key: str, name: str, known: Iterable[str], place: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name.startswith("~"):
        raise PolicyError(
            f"{key} is {name[:100]!r}, a path on this {place}'s disk. Let it travel with the job (files), or name one "
            f"of the {place}'s models: {', '.join(sorted(known)) or 'none'}."
        )


def in_folder(path: str, directory: Path) -> str:
    """Return a path of a settings file, which lies in ``directory``, as an absolute one."""
    found = Path(path).expanduser()
    return str(found if found.is_absolute() else (directory / found).absolute())


def unsigned(job: Job, signer: Identity) -> Bundle:
    """Return what the bundle of ``job`` would say if ``signer`` signed it now.

    Raises:
        JobError: a file that the job names is missing or lies outside the job's folder.
    """
    files = {name: _hashed(source) for name, source in _named_files(job).items()}
    return Bundle(job, signer, files, datetime.now(UTC))


def pack(job: Job, path: Path, kit: Kit) -> list[int]:
    """Write the bundle of ``job`` to ``path``, signed by the kit's key.

    Returns:
        the offsets at which the file is best cut for transfer, so that unchanged files have unchanged pieces.

    Raises:
        JobError: a file that the job names is missing or lies outside the job's folder.
        StorageError: the disk is full or the folder can't be written.
    """
    sources = _named_files(job)
    files = {name: _hashed(source) for name, source in sources.items()}
    values = job.model_dump(mode="json")
    values.pop("directory")
    head = msgspec.json.encode(_Head(FORMAT, values, files, datetime.now(UTC)))
    if len(head) > MAX_HEAD_BYTES:
        raise JobError(f"The job is too long to travel: {len(head)} bytes, at most {MAX_HEAD_BYTES}.")
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, data in ((_HEAD, head), (_SIGNATURE, kit.sign(head)), (_CERTIFICATE, kit.certificate_pem())):
                archive.writestr(zipfile.ZipInfo(name), data)
            cuts = {0}
            for name, source in sorted(sources.items()):
                entry = zipfile.ZipInfo(_FILES + name)
                with _readable(source) as file, archive.open(entry, "w", force_zip64=True) as target:
                    assert archive.fp is not None
                    begin = archive.fp.tell()
                    size, digest = files[name]
                    if _copy(file, target, size) != digest or file.read(1):
                        raise JobError(f"{str(source)!r} changed while it was packed. Nothing was sent; try again.")
                    cuts |= {*range(begin, begin + size, _BLOCK), begin + size}
        return sorted({*cuts, path.stat().st_size})
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage.full(path, error) from error
    except HansaError:
        path.unlink(missing_ok=True)
        raise


def _named_files(job: Job) -> dict[str, Path]:
    """Return name -> path of everything that travels: what ``files`` names, the script, the factory."""
    root = job.path(".").absolute()
    script = job.recipe.options.get("path") if job.recipe.name == "script" else None
    single = [script] if isinstance(script, str) else []
    if job.model.factory is not None:
        file, _, name = job.model.factory.rpartition(":")
        single.append(file if name.isidentifier() and file else job.model.factory)
    found: dict[str, Path] = {}
    for item, matches in [
        *((item, [root / item]) for item in single),
        *((item, _matches(root, item)) for item in job.files),
    ]:
        there = [match for match in matches if match.exists()]
        if not there:
            raise JobError(f"The job names {item!r}, and there is no such file in {root}.")
        for match in there:
            for path in sorted(p for p in match.rglob("*") if p.is_file()) if match.is_dir() else [match]:
                if "__pycache__" not in path.parts:
                    found[_name_in(root, path)] = path
    if len(found) > MAX_FILES:
        raise JobError(f"{len(found)} files would travel with the job; at most {MAX_FILES} can. Pack them into fewer.")
    try:
        _check_names(found)
    except WireError as error:
        raise JobError(f"{error.message} Rename it, or leave it out of files.") from None
    return found


def _matches(root: Path, item: str) -> list[Path]:
    """Return the files and folders that an entry of ``files`` names: as it stands, else as a glob."""
    if (root / item).exists() or Path(item).is_absolute():
        return [root / item]
    try:
        return sorted(root.glob(item))
    except (ValueError, NotImplementedError) as error:
        raise JobError(f"files: {item!r} is neither a file nor a glob ({error}).") from None


def _name_in(root: Path, path: Path) -> str:
    """Return the name under which a file travels: its place in the job's folder, links to files in it as they stand."""
    plain = Path(os.path.normpath(path))
    outside = f"{str(path)!r} lies outside the job's folder {root}, so it can't travel with it."
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        raise JobError(
            outside if path.is_file() else f"{str(path)!r} is no plain file, so it can't travel with the job."
        )
    for base in (root, root.resolve()):
        if plain.is_relative_to(base):
            return plain.relative_to(base).as_posix()
    raise JobError(outside)


def _check_names(names: Iterable[str]) -> None:
    """Raise WireError for a name that can't be put into a folder, or two of which one would have to be a folder."""
    known = set(names)
    for name in known:
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            length = MAX_NAME_BYTES + 1
        path = PurePosixPath(name)
        sound = name == path.as_posix() and not path.is_absolute() and ".." not in path.parts and path.parts
        longest = max((len(part.encode(errors="replace")) for part in path.parts), default=0)
        if not sound or length > MAX_NAME_BYTES or longest > 255 or "\\" in name or not name.isprintable():
            raise WireError(f"A file in a bundle can't be called {name[:80]!r}.")
        if inside := next((str(parent) for parent in path.parents if str(parent) in known), None):
            raise WireError(f"A bundle has the file {inside[:80]!r} and files inside it.")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise JobError(f"Can't read {str(path)!r}, which travels with the job: {error.strerror}.") from error
    with file:
        yield file


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
        there = sorted(archive.namelist())
    try:
        head = msgspec.json.decode(head_bytes, type=_Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"The bundle's head is malformed: {error}.") from None
    signer = roster.admit(certificate, head.created)
    allowed(signer, Permission.SUBMIT)
    verify(head_bytes, signature, certificate)
    if head.format != FORMAT:
        raise VersionError(f"The bundle has format {head.format}; this release reads {FORMAT}.")
    if len(head.files) > MAX_FILES or sum(size for size, _ in head.files.values()) > path.stat().st_size:
        raise WireError("The bundle lists more than it can hold.")
    _check_names(head.files)
    if there != sorted((_HEAD, _SIGNATURE, _CERTIFICATE, *(_FILES + name for name in head.files))):
        raise WireError("The bundle holds other files than were signed.")
    return Bundle(config.parse({**head.job, "directory": "."}), signer, head.files, head.created)


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
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except HansaError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset in the archive leads to before its beginning
            raise WireError(f"{path.name} is no well-formed bundle: {error}.") from None
        raise StorageError(f"Can't read the bundle {path}: {error.strerror}.") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise WireError(f"{path.name} is no well-formed bundle: {error}.") from None


_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


def _check_directory(path: Path) -> None:
    """Raise WireError if the archive's directory, which is read at once, would be too long.

    PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16; as zipfile, this reads the 64-bit record right before its locator.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
        tail = file.read()
    end = tail[-_END.size :]
    if len(end) < _END.size or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise WireError(f"{path.name} is no bundle, or the end of it is missing.")
    entries, num_bytes = _END.unpack(end)[4:6]
    before = tail[: -_END.size]
    if before[-_LOCATOR.size :][:4] == b"PK\6\7" and len(before) == _LOCATOR.size + _END64.size:
        longer = _END64.unpack(before[: _END64.size])
        entries, num_bytes = max(entries, longer[7]), max(num_bytes, longer[8])
    if entries > MAX_FILES + 3 or num_bytes > MAX_DIRECTORY_BYTES:
        raise WireError(f"{path.name} claims {entries} entries; a bundle has at most {MAX_FILES}.")


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise WireError(f"The bundle has no {name}.") from None
    if entry.file_size > MAX_HEAD_BYTES or entry.compress_type != zipfile.ZIP_STORED:
        raise WireError(f"The bundle's {name} is too large or compressed.")
    return archive.read(entry)
