# SPDX-License-Identifier: Apache-2.0
"""The other end of :mod:`hansa.client`: a script as the program that gives it tasks sees it.

:class:`Started` is a process of ours; :class:`Attached` is a folder in which a process that the site's owner
started by hand finds the job. Both are given a task by ``exchange`` and return the answer.

| case | result |
|---|---|
| a script ends, or does not answer in time | SiteError with its last lines; a started one is ended |
| an attached process goes in the middle of a task | SiteError; the next task waits for it, or for another |
| it goes between two tasks, or comes after the job | nothing is lost: the task waits |
| a second process attaches to the same folder | it waits its turn until the first has gone |
| a wrong token, or what is no message | that connection is closed, and the next one is waited for |
| the folder is another user's, or open to others | JobError: whoever can write there could take the model |
| what ``log`` sends | given to ``note`` as it comes |
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import secrets
import select
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.client.link import PROTOCOL, SOCKET_FILE, SOCKET_VARIABLE, TOKEN_FILE, TOKEN_VARIABLE, Link
from hansa.core.tree import Array, Parts
from hansa.errors import HansaError, JobError, SiteError

Answer = tuple[dict[str, Any], dict[str, dict[str, Array]]]
Note = Callable[[Mapping[str, Any]], None]

_LOG = logging.getLogger("hansa.script")
_POLL_S = 0.05
_GREETING_S = 10.0
_END_S = 15.0
_TAIL_LINES = 20
_EPILOGUE = "(exitcode: "  # how torchrun begins a page about a rank that failed; the rank's own last lines come before


class ReturnedError(SiteError):
    """The script ended without an error and without an answer."""


class _Line:
    """A connected script, with a thread that takes what it says as it says it."""

    def __init__(self, link: Link, note: Note) -> None:
        self._link = link
        self._note = note
        self._answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether the script is still there."""
        return self._thread.is_alive()

    def tell(self, message: Mapping[str, Any], parts: Parts | None, limit_s: float | None) -> None:
        """Send a message; TimeoutError if the script does not take it within ``limit_s``."""
        wait = struct.pack("@ll", *divmod(int((limit_s or 0) * 1e6), 1_000_000))
        self._link.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        try:
            self._link.send(message, parts)
        except BlockingIOError:
            raise TimeoutError from None

    def answer(self, until: float | None) -> Answer:
        """Return what the script answers; TimeoutError at ``until``, OSError when it has gone."""
        try:
            found = self._answers.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._link.connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._link.close()

    def _listen(self) -> None:
        try:
            while True:
                message, parts = self._link.receive()
                if message.get("type") == "log":
                    self._note(message)
                else:
                    self._answers.put((message, parts))
        except (OSError, HansaError) as error:
            self._answers.put(error)


class _Door:
    """A listening socket that lets in whoever has the token."""

    def __init__(self, address: str, token: str) -> None:
        self._token = token
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(address)
            self._listener.listen(8)
        except OSError:
            self._listener.close()
            raise

    def admit(self, site: str, until: float | None, note: Note, look: Callable[[], None]) -> _Line:
        """Wait for a script that has the token; ``look`` is called while nobody comes, and may raise."""
        while True:
            if not select.select([self._listener], [], [], _POLL_S)[0]:
                look()
                if until is not None and time.monotonic() > until:
                    raise TimeoutError
                continue
            connection, _ = self._listener.accept()
            connection.settimeout(_GREETING_S)
            link = Link(connection)
            try:
                hello, _ = link.receive()
                known = secrets.compare_digest(str(hello.get("token")), self._token)
                if known and hello.get("protocol") == PROTOCOL:
                    link.send({"type": "welcome", "site": site})
                    connection.settimeout(None)
                    return _Line(link, note)
            except (OSError, HansaError) as error:
                _LOG.warning("%s: a process connected and gave up (%s)", site, error)
                link.close()
                continue
            link.close()
            if known:
                raise SiteError("The script runs with another release of hansa than this one.", site=site)
            _LOG.warning("%s: a process without this job's token was turned away", site)

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()


class Started:
    """A script that runs as a process of ours, from its start to its end.

    Args:
        site: whose it is.
        command, environment, folder: how it is started.
        note: is given what the script logs.
        telling: whether errors give what it printed last; else that is in the log only.

    Raises:
        JobError: it can't be started.
    """

    def __init__(
        self,
        site: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        note: Note,
        telling: bool = True,
    ) -> None:
        self._site = site
        self._note = note
        self._telling = telling
        self._line: _Line | None = None
        self._busy = False
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        token = secrets.token_hex(16)
        self._place = Path(tempfile.mkdtemp(prefix="hansa-"))
        address = str(self._place / SOCKET_FILE)
        self._door = _Door(address, token)
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, SOCKET_VARIABLE: address, TOKEN_VARIABLE: token},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._close_door()
            raise JobError(
                f"The script can't be started ({shlex.join(command)}): {error.strerror}.", site=site
            ) from None
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def exchange(self, message: Mapping[str, Any], parts: Parts, limit_s: float | None) -> Answer:
        """Send a task and return the answer.

        Raises:
            SiteError: the script ended, or did not answer in time. It is ended.
            ReturnedError: it ended by itself, without an error.
        """
        until = None if limit_s is None else time.monotonic() + limit_s
        self._busy = True
        try:
            if self._line is None:
                self._line = self._door.admit(self._site, until, self._note, self._look)
                self._close_door()
            self._line.tell(message, parts, limit_s)
            answer = self._line.answer(until)
        except TimeoutError:
            self.kill()
            raise SiteError(
                f"The script did not answer for {limit_s:g} s and was ended. Mend what it waits for, "
                f"or raise recipe.timeout_s.{self._last_lines()}",
                site=self._site,
            ) from None
        except ConnectionError:
            error = self._ended()
            self.kill()
            raise error from None
        except BaseException:  # whatever ended the exchange, the process is in the middle of it
            self.kill()
            raise
        self._busy = False
        return answer

    def end(self) -> None:
        """Say that the federation has ended, give the script a moment to return unless it trains, and end it."""
        if self._line is not None and self.running and not self._busy:
            try:
                self._line.tell({"type": "end"}, None, _END_S)
                self._process.wait(_END_S)
            except (OSError, subprocess.TimeoutExpired):
                _LOG.warning("%s: the script did not return within %g s after the end", self._site, _END_S)
        self.kill()

    def kill(self) -> None:
        """End the script at once and free what it held."""
        self._process.kill()
        self._process.wait()
        self._reader.join(1.0)
        if self._process.stdout and not self._reader.is_alive():
            self._process.stdout.close()
        if self._line is not None:
            self._line.close()
        self._close_door()

    def _look(self) -> None:
        if not self.running:
            raise ConnectionResetError

    def _ended(self) -> SiteError:
        """Return the error that says how the script ended."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return SiteError(f"The script closed its connection and went on.{self._last_lines()}", site=self._site)
        self._reader.join(1.0)
        if code == 0 and self._line is None:
            text = "The script ended without calling hansa.client.init(), so it takes no part."
            return SiteError(text + self._last_lines(), site=self._site)
        if code == 0:
            text = "The script returned before it answered: receive() and send() belong in while is_running()."
            return ReturnedError(text + self._last_lines(), site=self._site)
        how = f"with exit code {code}" if code > 0 else f"by signal {-code}"
        return SiteError(f"The script ended {how}.{self._last_lines()}", site=self._site)

    def _last_lines(self) -> str:
        if not self._telling:
            return " What it printed is in the site's log, and under dp-sgd stays there."
        return f" Its last lines:\n    {'    '.join(self._tail).rstrip()}" if self._tail else ""

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        telling = True
        for line in self._process.stdout:
            text = line.decode(errors="replace")
            telling = telling and _EPILOGUE not in text
            if telling:
                self._tail.append(text)
            _LOG.info("%s: %s", self._site, text.rstrip())

    def _close_door(self) -> None:
        self._door.close()
        shutil.rmtree(self._place, ignore_errors=True)


class Attached:
    """A folder in which a process that was started by hand finds the site's tasks."""

    running = True

    def __init__(self, site: str, folder: Path, note: Note) -> None:
        self._site = site
        self._folder = folder
        self._note = note
        self._line: _Line | None = None
        self._busy = False
        token = secrets.token_hex(16)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise JobError(
                    f"The folder {str(folder)!r}, where a process is to attach, is open to others. Make it yours "
                    "alone: chmod 700.",
                    site=site,
                )
            for name in (TOKEN_FILE, SOCKET_FILE):
                (folder / name).unlink(missing_ok=True)
            (folder / TOKEN_FILE).touch(mode=0o600, exist_ok=False)
            (folder / TOKEN_FILE).write_text(token)
            self._door = _Door(str(folder / SOCKET_FILE), token)
        except OSError as error:
            raise JobError(
                f"No process can attach at {str(folder)!r}: {error}. Give a folder with a short path that this "
                "user may write to.",
                site=site,
            ) from None

    def exchange(self, message: Mapping[str, Any], parts: Parts, limit_s: float | None) -> Answer:
        """Send a task to the attached process, waiting for one if there is none, and return the answer.

        Raises:
            SiteError: none attached, it did not answer in time, or it has gone.
        """
        until = None if limit_s is None else time.monotonic() + limit_s
        self._busy = True
        try:
            if self._line is not None and not self._line.open:
                self._hang_up()
            if self._line is None:
                _LOG.info("%s: waiting for a process to attach at %s", self._site, self._folder)
                self._line = self._door.admit(self._site, until, self._note, lambda: None)
                _LOG.info("%s: a process has attached", self._site)
            self._line.tell(message, parts, limit_s)
            answer = self._line.answer(until)
        except TimeoutError:
            what = "No process attached" if self._line is None else "The attached process did not answer"
            self._hang_up()
            raise SiteError(
                f"{what} at {str(self._folder)!r} within {limit_s:g} s. Start it there, or raise recipe.timeout_s.",
                site=self._site,
            ) from None
        except ConnectionError:
            self._hang_up()
            raise SiteError(
                f"The attached process has gone. Start it again with HANSA_ATTACH={self._folder}.", site=self._site
            ) from None
        except BaseException:  # whatever ended the exchange, the process is in the middle of it
            self._hang_up()
            raise
        self._busy = False
        return answer

    def end(self) -> None:
        """Say that the federation has ended, and take the folder's files away."""
        if self._line is not None and self._line.open and not self._busy:
            with contextlib.suppress(OSError):
                self._line.tell({"type": "end"}, None, _END_S)
        self.kill()

    def kill(self) -> None:
        """Hang up, and take the folder's files away; the process itself is its owner's."""
        self._hang_up()
        self._door.close()
        for name in (TOKEN_FILE, SOCKET_FILE):
            (self._folder / name).unlink(missing_ok=True)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None
