# SPDX-License-Identifier: Apache-2.0
"""What ``hansa quickstart`` needs: private corpora, a small pre-trained model, and the job over them.

Everything comes from the Python source text that ships with the running interpreter, so nothing is downloaded. The
base is a byte-level Llama, pre-trained on modules of the language's core and its tools. The sites are eight teams that
each keep other networking or concurrency packages to themselves; the base has read none of those.

The split is by file. A package's files are put in the order of the SHA-256 of their paths, then dealt out: first to
the held-out test text, then to the validation text, then to the training text.

| text | a site has at most | used for |
|---|---|---|
| train | ``TRAIN_BYTES`` | local training |
| validation | ``HELD_OUT_BYTES`` | choosing the settings in this file, once, by its authors; no run reads it |
| test | ``HELD_OUT_BYTES`` | the report |

Files are cut at line ends to fit. The order does not depend on what the files say, and no file is in two texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from hansa.client import torch as local
from hansa.client.batches import shuffled
from hansa.core import config, storage
from hansa.core.config import Job
from hansa.errors import DataError, JobError, ModelError, NonFiniteError
from hansa.recipes import causal_lm
from hansa.recipes.data import SiteData
from hansa.recipes.pretrained import saving

Report = Callable[[int, int, float], None]
"""What is told of pre-training: ``(done steps, total steps, loss in nats per byte)``."""

SITES: Mapping[str, Sequence[str]] = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "http": ("http",),
    "mail-clients": ("smtplib", "poplib", "imaplib", "netrc", "getpass"),
    "multiprocessing": ("multiprocessing",),
    "rpc": ("xmlrpc", "wsgiref", "socketserver"),
    "sockets": ("ftplib", "socket", "ssl", "selectors", "ipaddress"),
    "urllib": ("urllib", "webbrowser", "mimetypes"),
}
"""Site -> the standard library's packages and modules that only it has; all are in CPython 3.11 to 3.14."""

# No networking and no concurrency: what the sites know is new to the base. Modules that some distributions strip
# (test, tkinter, idlelib, ensurepip, ...) and tables that are no code (encodings, pydoc_data) are left out.
PUBLIC: Sequence[str] = (
    *("argparse", "ast", "base64", "bdb", "bisect", "bz2", "calendar", "cmd", "code", "codeop", "collections"),
    *("compileall", "configparser", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime", "_pydecimal"),
    *("difflib", "dis", "doctest", "enum", "filecmp", "fileinput", "fractions", "functools", "gettext", "glob"),
    *("graphlib", "gzip", "hashlib", "heapq", "html", "importlib", "inspect", "json", "linecache", "locale", "lzma"),
    *("modulefinder", "ntpath", "numbers", "operator", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools"),
    *("pkgutil", "platform", "plistlib", "posixpath", "pprint", "profile", "pstats", "pyclbr", "pydoc", "_pyio"),
    *("random", "re", "reprlib", "rlcompleter", "runpy", "shelve", "shlex", "shutil", "site", "sqlite3", "stat"),
    *("statistics", "string", "_strptime", "symtable", "sysconfig", "tabnanny", "tarfile", "tempfile", "textwrap"),
    *("timeit", "tokenize", "tomllib", "trace", "traceback", "tracemalloc", "types", "typing", "unittest", "warnings"),
    *("wave", "weakref", "xml", "zipapp", "zipfile", "zipimport", "zoneinfo"),
)
"""The packages and modules whose text the base is pre-trained on."""

TRAIN_BYTES = 40_000
HELD_OUT_BYTES = 6_000
PUBLIC_BYTES = 4_000_000

# One long file must not be all that a text is made of.
_TRAIN_FILE_BYTES = 14_000
_PUBLIC_FILE_BYTES = 60_000
_LEAST_FILE_BYTES = 600
# A held-out text is full enough at this share; else a last short piece of a file would be all of that file's say.
_FULL = 0.6
_TESTS = frozenset({"test", "tests", "__pycache__"})

MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""The base: 0.64 M parameters."""

MAX_LENGTH = 128
"""Bytes of a training example."""

PROMPTS = ("        self.sock", "    def send", "        return ")
"""Beginnings of lines, which the report shows the model going on from."""


_SHOWN: Mapping[str, Any] = {"max_new_tokens": 120, "temperature": 0.5}


@dataclass(frozen=True)
class Pretraining:
    """How the base is made: AdamW, the learning rate warmed up, then lowered along a cosine to a twentieth.

    Attributes:
        steps: optimiser steps.
        lr: the highest learning rate.
        warmup: steps until it is reached.
        batch_size: examples of ``MAX_LENGTH`` bytes a step.
        threads: CPU threads; part of the result. More than one is slow on a machine that has other work.
        seed: what weights and order are drawn from.
    """

    steps: int = 1000
    lr: float = 3e-3
    warmup: int = 50
    batch_size: int = 8
    threads: int = 1
    seed: int = 0

    def factor(self, step: int) -> float:
        """Return what ``lr`` is multiplied by at ``step``, counted from 0.

        >>> [round(Pretraining(steps=100, warmup=10).factor(step), 2) for step in (0, 9, 50, 100)]
        [0.1, 0.98, 0.53, 0.05]
        """
        return min(1.0, (step + 1) / self.warmup) * (0.525 + 0.475 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class SiteText:
    """The files of one site, ``path in the standard library -> text``, in the three disjoint texts."""

    train: Mapping[str, str]
    validation: Mapping[str, str]
    test: Mapping[str, str]


@dataclass(frozen=True)
class Corpora:
    """All text of the quickstart: what the base is pre-trained on, and what each site has."""

    public: Mapping[str, str]
    sites: Mapping[str, SiteText]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of every path and text, as 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(asdict(self), order="sorted")).hexdigest()


@dataclass(frozen=True)
class SiteFiles:
    """Site -> the folder that holds its files, for training and held out."""

    train: Mapping[str, Path]
    test: Mapping[str, Path]


@dataclass(frozen=True)
class Base:
    """The pre-trained model.

    Attributes:
        directory: a ``transformers`` directory with model and tokenizer.
        cached: whether an earlier run made it.
        seconds: how long pre-training took, then.
        num_bytes: bytes of text trained on, repeats counted.
        loss: mean of the last tenth of the steps, in nats per byte.
    """

    directory: Path
    cached: bool
    seconds: float
    num_bytes: int
    loss: float


def gather(stdlib: Path | None = None) -> Corpora:
    """Read the corpora from a standard library's source files, the running interpreter's by default.

    Raises:
        DataError: a site is left without text to train on or to hold out: the source files are not installed.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    sites = {name: _dealt(_sources(root, modules)) for name, modules in SITES.items()}
    public = _filled(_sources(root, PUBLIC), PUBLIC_BYTES, _PUBLIC_FILE_BYTES)
    for name, text in sites.items():
        if not (text.train and text.validation and text.test):
            raise DataError(
                f"The site {name!r} finds too few source files in {root} (it needs {', '.join(SITES[name])}). The "
                "quickstart reads the standard library's .py files: use an interpreter that ships them."
            )
    if not public:
        raise DataError(f"There is no Python source text to pre-train on in {root}. Use an interpreter that ships it.")
    return Corpora(public, sites)


def _sources(root: Path, modules: Iterable[str]) -> dict[str, str]:
    """Return path -> text of all source files of ``modules``, in the order of the paths' SHA-256."""
    found = {}
    for module in modules:
        package = root / module
        files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{module}.py"]
        for file in files:
            path = file.relative_to(root)
            if not _TESTS & set(path.parts) and file.is_file() and file.stat().st_size >= _LEAST_FILE_BYTES:
                found[path.as_posix()] = _text(file)
    return dict(sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def _text(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"The source file {path} can't be read: {error}.") from error


def _dealt(sources: Mapping[str, str]) -> SiteText:
    remaining = dict(sources)
    test = _taken(remaining, HELD_OUT_BYTES)
    validation = _taken(remaining, HELD_OUT_BYTES)
    return SiteText(_filled(remaining, TRAIN_BYTES, _TRAIN_FILE_BYTES), validation, test)


def _taken(remaining: dict[str, str], limit: int) -> dict[str, str]:
    """Move files from ``remaining`` until they make ``_FULL`` of ``limit`` bytes."""
    taken: dict[str, str] = {}
    while remaining and _size(taken.values()) < _FULL * limit:
        path = next(iter(remaining))
        taken[path] = _cut(remaining.pop(path), limit - _size(taken.values()))
    return taken


def _filled(sources: Mapping[str, str], limit: int, file_limit: int) -> dict[str, str]:
    filled: dict[str, str] = {}
    left = limit
    for path, text in sources.items():
        piece = _cut(text, min(left, file_limit))
        if piece:
            filled[path] = piece
            left -= len(piece.encode())
    return filled


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _cut(text: str, limit: int) -> str:
    """Return whole lines of ``text``, at most ``limit`` bytes."""
    data = text.encode()
    return text if len(data) <= limit else data[: data.rfind(b"\n", 0, limit) + 1].decode()


def cache_directory() -> Path:
    """Return where Hansa keeps what it can make again: $HANSA_CACHE, $XDG_CACHE_HOME/hansa or ~/.cache/hansa."""
    if own := os.environ.get("HANSA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "hansa"


def write_sites(corpora: Corpora, cache: Path | None = None) -> SiteFiles:
    """Write each site's files to the cache, once, and return where they lie.

    Args:
        corpora: what :func:`gather` returns.
        cache: the folder; :func:`cache_directory` by default.

    Raises:
        StorageError: the disk is full or the cache can't be written.
    """
    final = (cache or cache_directory()) / "quickstart" / f"sites-{corpora.digest[:16]}"
    if not final.is_dir():
        with _made(final) as folder:
            for site, text in corpora.sites.items():
                _write(folder / site / "train", text.train)
                _write(folder / site / "test", text.test)
    return SiteFiles(
        {site: final / site / "train" for site in corpora.sites},
        {site: final / site / "test" for site in corpora.sites},
    )


def _write(folder: Path, sources: Mapping[str, str]) -> None:
    folder.mkdir(parents=True)
    for path, text in sources.items():
        # Written as bytes, so that line ends are the same on every system.
        (folder / f"{path.removesuffix('.py').replace('/', '.')}.txt").write_bytes(text.encode())


@contextlib.contextmanager
def _made(final: Path) -> Iterator[Path]:
    """Give a folder to fill, which appears as ``final``, whole, at the end, or not at all."""
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can open
        storage.publish(temporary, final)
    except OSError as error:
        raise storage.full(final, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def pretrained(
    corpora: Corpora,
    progress: Report | None = None,
    *,
    cache: Path | None = None,
    plan: Pretraining | None = None,
    model: Mapping[str, Any] = MODEL,
) -> Base:
    """Return the base model from the cache; it is pre-trained on ``corpora.public`` first if it is not there.

    It is made again if the text, the interpreter's version, the plan or the model's config differ.

    Args:
        corpora: what :func:`gather` returns.
        progress: told of every step: (done, total, loss in nats per byte).
        cache: the folder; :func:`cache_directory` by default.
        plan: how it is trained.
        model: a ``transformers`` config with its ``model_type``.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        StorageError: the disk is full or the cache can't be written.
    """
    plan = plan or Pretraining()
    key = {
        "format": 1,
        "model": dict(model),
        "plan": asdict(plan),
        "python": platform.python_version(),
        "corpora": corpora.digest,
    }
    name = hashlib.sha256(msgspec.json.encode(key, order="sorted")).hexdigest()[:16]
    final = (cache or cache_directory()) / "quickstart" / f"base-{name}"
    cached = final.is_dir()
    if not cached:
        with _made(final) as folder:
            storage.write_json(
                folder / "pretraining.json", {**key, **_pretrain(corpora, folder, progress, plan, model)}
            )
    facts = storage.read_json(final / "pretraining.json")
    return Base(final, cached, facts["seconds"], facts["num_bytes"], facts["loss"])


def _pretrain(
    corpora: Corpora, folder: Path, progress: Report | None, plan: Pretraining, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Train on the public text, save the model to ``folder``, and return the facts of it."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as text:
        _write(Path(text) / "public", corpora.public)
        job = config.parse(
            {
                "name": "pretraining",
                "seed": plan.seed,
                "recipe": {"name": "causal-lm", "max_length": MAX_LENGTH},
                "model": {"config": dict(model), "tokenizer": "bytes"},
                "data": {"train": {"public": str(Path(text) / "public")}, "test_fraction": 0, "format": "text"},
            }
        )
        task = causal_lm.CausalLM("text", causal_lm.Options(max_length=MAX_LENGTH))
        tokenizer = task.processor(job)
        examples = task.examples(SiteData(job, task.roles, task.text_rows).load("public").train, tokenizer)
    net, _ = task.load(job, tokenizer)
    order = shuffled(len(examples), plan.batch_size, plan.seed, "pretraining")
    # A loop of its own, since a site's has no schedule: with a constant rate the base needs twice the steps.
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.factor)
    losses: list[float] = []
    with _threads(plan.threads), local.seeded(plan.seed, "pretraining"):
        net.train()
        for rows in itertools.islice(order, plan.steps):
            loss, sums = task.loss(net, task.batch([examples[row] for row in rows], tokenizer))
            losses.append(sums["loss_sum"] / sums["tokens"])
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"The loss of pre-training step {len(losses)} is {losses[-1]}. Lower its lr.")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(len(losses), plan.steps, losses[-1])
    saved: Any = net
    with saving(folder):
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "seconds": time.monotonic() - begun,
        "num_bytes": plan.steps * plan.batch_size * MAX_LENGTH,
        "loss": sum(last) / len(last),
    }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def job(base: Path, files: SiteFiles, *, seed: int = 0) -> Job:
    """Return the quickstart's job: the sites of ``files`` fine-tune ``base`` together with LoRA.

    Args:
        base: a directory with any causal language model and its tokenizer.
        files: what :func:`write_sites` returns.
        seed: of the adapter's first weights and of the order of the data.
    """
    data = {
        "train": {site: str(folder) for site, folder in files.train.items()},
        "test": {site: str(folder) for site, folder in files.test.items()},
        "format": "text",
    }
    return _job(base, data, None, seed, "quickstart", {"max_length": MAX_LENGTH, "prompts": PROMPTS, **_SHOWN})


def job_for_base(
    base: Path, data: Path, *, key: str, column: str = "text", sites: int = 8, max_length: int = 128, seed: int = 0
) -> Job:
    """Return the quickstart's job for one's own model and data: the same federation over a file's largest groups.

    Args:
        base: a directory with any causal language model and its tokenizer.
        data: a JSONL file (``.gz`` too); a fifth of each site's rows is held out.
        key: the column whose values are the sites.
        column: the column that holds the text.
        sites: how many of the key's most frequent values take part.
        max_length: tokens of a training example.
        seed: of the adapter's first weights, the held-out rows, and the order of the data.

    Raises:
        DataError: there is no such file.
        ModelError: there is no such directory.
        JobError: fewer than two sites are asked for.
    """
    if not data.is_file():
        raise DataError(f"There is no data file {str(data)!r}. Give a JSONL file.")
    if sites < 2:
        raise JobError(f"A federation has at least two sites, not {sites}.")
    section = {"train": str(data.absolute()), "columns": {"text": column}}
    partition = {"name": "by_key", "key": key, "sites": sites}
    return _job(base, section, partition, seed, f"quickstart-{key}", {"max_length": max_length})


def _job(
    base: Path,
    data: Mapping[str, Any],
    partition: Mapping[str, Any] | None,
    seed: int,
    name: str,
    options: Mapping[str, Any],
) -> Job:
    if not base.is_dir():
        raise ModelError(
            f"There is no model folder {str(base)!r}. --base takes a directory that transformers can open."
        )
    return config.parse(
        {
            "name": name,
            "seed": seed,
            "rounds": 32,
            "recipe": {"name": "causal-lm", **options},
            "model": {
                "base": str(base.absolute()),
                "adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            },
            "data": data,
            "partition": partition,
            "train": {"optimizer": "adamw", "lr": 1e-3, "batch_size": 4, "steps": 8, "clip_grad": 1.0},
            "strategy": {"name": "fedavgm", "momentum": 0.8},
            "engine": {"name": "processes", "threads": 1},
            "evaluation": {"every": 4},
            "baselines": {"base": True, "local": True, "central": True},
        }
    )
