# SPDX-License-Identifier: Apache-2.0
"""A person's side of a federation: submit jobs, watch them, fetch what they gave.

    with hansa.Federation("users/ana") as federation:
        id = federation.submit(hansa.load("job.toml"))
        for event in federation.follow(id):
            print(event.time, event.text)
        federation.download(id, "results")

Who you are and where the server is stand in the folder of your kit: its certificate, and ``client.toml``. Whatever
the network does, a call is made again until it is answered or patience ends; no job is started twice by that.

| case | result |
|---|---|
| the reply to a submission is lost | sent again with the same key, it is the same job |
| a download is cut off, or killed | the next one into the same folder goes on; a file has its name when it is whole |
| the server names a result "../x", "/x" or "a\\0b" | WireError; nothing is written |
| the log's stream breaks | opened again after the last line; UnreachableError when patience ends |
| the job failed, and why it did | :func:`failure` gives the error of its own kind |
"""

from __future__ import annotations

import asyncio
import queue
import tempfile
import threading
import tomllib
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

import pydantic
from pydantic import Field

from hansa import bundle, errors
from hansa.core.config import Job, Section, problems
from hansa.core.values import Absence, Model, RoundRecord
from hansa.errors import HansaError, InterruptedRunError, JobError, SiteError, UnreachableError, WireError, nearest
from hansa.pki.kit import Kit
from hansa.runs.masking import prepared, told
from hansa.runs.progress import Progress
from hansa.transport.client import Connection
from hansa.transport.messages import (
    AbortJob,
    DeleteJob,
    Follow,
    JobEvent,
    JobLine,
    JobView,
    ListJobs,
    ListSites,
    ResumeJob,
    ShowJob,
    SiteLine,
    Submit,
    WithdrawSite,
)
from hansa.transport.pieces import describe

FILE = "client.toml"
ENDED = ("finished", "failed", "aborted")
"""States of a job that nothing works on."""

Moved = Callable[[str, int, int], None]
"""Called with (a file's name, bytes that are there, bytes of the file)."""

_TICK_S = 1.0
_PAUSE_S = 0.2
_T = TypeVar("_T")


class ClientSettings(Section):
    """``client.toml``: how the server is reached."""

    server: str = Field(description="HOST:PORT of the federation's server.")
    proxy: str | None = Field(None, description="http://HOST:PORT of an HTTP proxy that takes CONNECT.")


def settings(directory: Path) -> ClientSettings:
    """Read ``client.toml`` in a kit's folder.

    Raises:
        JobError: it is missing or wrong.
    """
    path = directory / FILE
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(
            f"There is no {path}. Name the folder of your kit: --as DIR, or the variable HANSA_KIT; "
            "`hansa provision` makes one for each person."
        ) from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path} can't be read: {error}.") from None
    try:
        return ClientSettings(**values)
    except pydantic.ValidationError as error:
        raise JobError(f"{path} is not valid:\n" + "\n".join(problems(ClientSettings, error, values))) from None


class Federation:
    """A federation as one person sees it. A context manager; its methods may be called from several threads.

    Args:
        directory: the folder of the person's kit.
        server: ``HOST:PORT``, in place of what ``client.toml`` there says.
        patience_s: how long a call goes on trying to reach the server; None for ever.

    Raises:
        StorageError: there is no kit in the folder.
        AccessError: its files do not belong together.
        JobError: ``client.toml`` is missing or wrong.
    """

    def __init__(self, directory: str | Path, server: str | None = None, *, patience_s: float | None = 30.0) -> None:
        folder = Path(directory)
        proxy = None
        if server is None:
            chosen = settings(folder)
            server, proxy = chosen.server, chosen.proxy
        self._kit = Kit(folder)
        self._connection = Connection(self._kit, server, proxy=proxy, patience_s=patience_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="federation", daemon=True)

    @property
    def name(self) -> str:
        """Who one is here, e.g. ``lead/ana``."""
        return self._kit.identity.member

    def __enter__(self) -> Federation:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        await self._connection.__aexit__(None, None, None)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do ``work`` in the loop's thread and wait for it; Ctrl-C ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C comes here, and the loop works in another thread
            future.cancel()
            raise

    def submit(self, job: Job, *, key: str | None = None, moved: Moved | None = None) -> str:
        """Sign ``job``, upload it with the files it names, queue it, and return its id.

        Whether its updates are masked is settled first (`prepared`), and stands in what is signed.

        Args:
            job: what to do.
            key: names this submission: with the same key, a second one is the same job. A new one by default.
            moved: told how far the upload is.

        Raises:
            JobError: a file that the job names is missing, or the server can't take the job.
            AccessError: one may not submit jobs, or has as many as the quota allows.
            UnreachableError: the server could not be reached while patience lasted.
        """
        job, _ = self.prepared(job)
        key = key or uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="hansa-") as folder:
            path = Path(folder) / "bundle.zip"
            manifest = describe(path, bundle.pack(job, path, self._kit))
            told = None if moved is None else lambda done, total: moved(job.name, done, total)

            async def work() -> str:
                await self._connection.upload("", "bundle", path, manifest, progress=told)
                return (await self._connection.call(Submit(manifest.digest, key))).job

            return self._wait(work())

    def prepared(self, job: Job) -> tuple[Job, str]:
        """Return ``job`` as it is submitted, and a sentence on whether the server sees its updates or sums only.

        That is settled by the sites that one's own copy of the roster lists, not by what the server says; and where
        sites hand the model to each other, those sites are named in the job.
        """
        sites = job.cohort.sites or self._kit.roster().sites
        job = prepared(job, sites)
        return job, told(job, len(sites))

    def jobs(self) -> list[JobLine]:
        """Return the jobs one may see, oldest first."""
        return self._wait(self._connection.call(ListJobs())).jobs

    def job(self, id: str) -> JobView:
        """Return everything known of one job (JobError if there is none of that id)."""
        return self._wait(self._connection.call(ShowJob(id)))

    def sites(self) -> list[SiteLine]:
        """Return the federation's sites, by name."""
        return self._wait(self._connection.call(ListSites())).sites

    def abort(self, id: str) -> None:
        """Stop a job; its finished rounds stay."""
        self._wait(self._connection.call(AbortJob(id)))

    def withdraw(self, id: str, site: str) -> None:
        """Take a site out of a job for good; the others go on."""
        self._wait(self._connection.call(WithdrawSite(id, site)))

    def resume(self, id: str) -> None:
        """Go on with a failed or aborted job."""
        self._wait(self._connection.call(ResumeJob(id)))

    def delete(self, id: str) -> None:
        """Delete a job that is not under way, with all its files."""
        self._wait(self._connection.call(DeleteJob(id)))

    def follow(self, id: str, *, after: int = 0, wait: bool = True) -> Iterator[JobEvent]:
        """Yield the lines of a job's log.

        Args:
            id: the job.
            after: the number of the last line one has.
            wait: whether to go on until the job has ended.
        """
        for event in self._events(id, after, wait, None):
            if event is not None:
                yield event

    def _events(self, id: str, after: int, wait: bool, tick_s: float | None) -> Iterator[JobEvent | None]:
        """Yield what `follow` does, and None whenever ``tick_s`` went by without a line."""
        lines: queue.SimpleQueue[JobEvent | BaseException | None] = queue.SimpleQueue()

        async def read() -> None:
            last = after
            try:
                while True:
                    try:
                        async for event in self._connection.follow(Follow(id, last, wait)):
                            last = event.number
                            lines.put(event)
                        break
                    except UnreachableError:
                        await asyncio.sleep(_PAUSE_S)
                        await self._connection.call(ShowJob(id))  # it waits for the server, while patience lasts
                lines.put(None)
            except BaseException as error:
                lines.put(error)
                raise

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        try:
            while True:
                try:
                    line = lines.get(timeout=tick_s)
                except queue.Empty:
                    yield None
                    continue
                if line is None:
                    return
                if isinstance(line, BaseException):
                    raise line
                yield line
        finally:
            reading.cancel()

    def wait(self, id: str) -> JobView:
        """Wait until a job has ended, however it does, and return all that is known of it."""
        for _ in self.follow(id):
            pass
        return self.job(id)

    def watch(self, id: str, progress: Progress) -> JobView:
        """Wait as `wait` does, and show on ``progress`` what happens, as a run on this machine would."""
        seen = 0
        for event in self._events(id, 0, True, _TICK_S):
            if event is None:
                for site, doing in self.job(id).activities.items():
                    progress.doing(site, doing)
            elif event.kind == "stage":
                view = self.job(id)
                training = event.text == "federated training"
                progress.stage(event.text, view.line.rounds if training else 0, seen if training else 0)
            elif event.kind == "round":
                for record in self.job(id).records[seen:]:
                    progress.round(_record(record))
                    progress.advance()
                    seen += 1
            elif event.kind != "state":
                progress.say(event.text)
        return self.job(id)

    def download(
        self, id: str, directory: str | Path, *, names: Sequence[str] | None = None, moved: Moved | None = None
    ) -> list[Path]:
        """Fetch a finished job's results into ``directory`` and return their paths.

        Args:
            id: the job.
            directory: the folder; it is made. What is there already of an earlier download is not fetched again.
            names: which results; all by default. A folder's name stands for what is in it.
            moved: told how far each file is.

        Raises:
            JobError: the job has no results yet, or none of a name.
            AccessError: it is somebody else's job.
            WireError: the server names a file that can't be put into a folder, or sends damaged bytes.
            StorageError: the disk is full; what has arrived is kept.
        """
        view = self.job(id)
        files = view.files
        for name in files:
            _check_name(name)
        if not files:
            raise JobError(f"The job is {view.line.state} and has no results; a finished job has.", job=id)
        wanted = sorted(files)
        if names is not None:
            for name in names:
                if not any(_is_in(file, name) for file in files):
                    known = sorted({*files, *(file.partition("/")[0] for file in files)})
                    near = nearest(name, known) or f" It has: {', '.join(known)}."
                    raise JobError(f"The job has no result {name!r}.{near}", job=id)
            wanted = [file for file in wanted if any(_is_in(file, name) for name in names)]
        paths = []
        for file in wanted:
            path = Path(directory) / file
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise errors.StorageError(f"Can't make the folder {path.parent}: {error.strerror}.") from error
            digest, size = files[file]
            told = None if moved is None else lambda done, total, file=file: moved(file, done, total)
            self._wait(self._connection.download(id, digest, path, max_bytes=size, progress=told))
            paths.append(path)
        return paths


def failure(line: JobLine) -> HansaError | None:
    """Return the error that says how a job ended, or None if it has finished or goes on.

    It is of the kind that ended the job, where that is one of :mod:`hansa.errors`; else a SiteError.
    """
    if line.state == "aborted":
        return InterruptedRunError(
            f"The job was aborted; its finished rounds are kept. `hansa job resume {line.job}` goes on.", job=line.job
        )
    if line.state != "failed":
        return None
    kind = getattr(errors, line.kind, SiteError)
    known = isinstance(kind, type) and issubclass(kind, HansaError)
    return kind(line.error, job=line.job) if known else SiteError(line.error, job=line.job)


def _check_name(name: str) -> None:
    """Raise WireError for a name from the server that could lead out of the folder."""
    parts = PurePosixPath(name).parts
    clean = "/".join(parts) == name and not name.startswith("/")
    if not parts or not clean or any(part in (".", "..") for part in parts) or any(c in name for c in "\\\0:"):
        raise WireError(f"The server names a result {name[:80]!r} that can't be put into a folder; none was fetched.")


def _is_in(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name.rstrip('/')}/")


def _record(values: dict[str, Any]) -> RoundRecord:
    """Return what `RoundRecord.as_json` gave as a record, without its tensors."""
    return RoundRecord(
        job=values["job"],
        round=values["round"],
        asked=tuple(values["asked"]),
        accepted=tuple(values["accepted"]),
        absent=tuple(Absence(**absence) for absence in values["absent"]),
        metrics=values["metrics"],
        site_metrics=values["site_metrics"],
        notes=values["notes"],
        bytes_down=values["bytes_down"],
        bytes_up=values["bytes_up"],
        seconds=values["seconds"],
        model=Model(values["version"], {}, {}),
        state={},
        acknowledged={},
        logged=values.get("logged", {}),
    )
