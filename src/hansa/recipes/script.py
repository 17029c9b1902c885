# SPDX-License-Identifier: Apache-2.0
"""Recipe ``script``: every site runs the user's own training script, as a warm process of its own.

    recipe = { name = "script", path = "train.py", sites = 4, args = ["--lr", "0.1"] }
    model.factory = "train.py:Net"          # gives the first parameters; or a .safetensors file

The script is started once a site and course (the job, or one of its baselines), in the job's folder, and talks
through :mod:`hansa.client`. What it prints goes to the run's ``sites.log``. Its data are its own business; if
``data.train`` is a table SITE = file, the file's path is in HANSA_TRAIN (``data.test``: HANSA_TEST).

| case | result |
|---|---|
| the script ends with an error | no update from the site in this round, with its last lines; then started anew |
| it ends without an error, having answered before | it is started anew for the next task: a script without a loop |
| it does not answer | ended after ``timeout_s``, or ``PATIENCE`` deadlines of the cohort; else never |
| a tensor is missing, unknown, of another shape | no update from the site in this round; the tensor is named |
| an integer buffer | taken from a FULL model if it comes as integers; never averaged |
| ``is_evaluate()`` | asked for at ``evaluation.every``; what the script sends as metrics is used, parameters are not |
| it sends no metrics | there are none; nothing else changes |
"""

from __future__ import annotations

import collections
import importlib.util
import logging
import os
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hansa import registry
from hansa.client.link import PROTOCOL, SOCKET_VARIABLE, TOKEN_VARIABLE, Link
from hansa.core import rng, storage
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE, Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Array, Tree
from hansa.core.values import Plan, Task
from hansa.errors import DataError, HansaError, JobError, ModelError, SiteError, nearest

PATIENCE = 5
"""How many of the cohort's deadlines a script may take for an answer, if the job gives no ``timeout_s``."""

_LOG = logging.getLogger("hansa.script")
_POLL_S = 0.05
_END_S = 15.0
_TAIL_LINES = 12
_COUNT = "{}.count"


@dataclass(frozen=True)
class Options:
    """What a job may say beside ``name = "script"``.

    Attributes:
        path: the script, relative to the job's folder.
        sites: how many, named site-1, site-2, ...; or their names; by default those of ``data.train``.
        args: what the script gets on its command line.
        python: the interpreter that runs it (hansa has to be installed there); this one by default.
        env: what is set in its environment beside this process's own.
        timeout_s: seconds that it may take for one answer.
    """

    path: str
    sites: int | list[str] | None = None
    args: list[str] = field(default_factory=list)
    python: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None


def build(job: Job) -> Script:
    """Return the program of a job with recipe ``script``.

    Raises:
        JobError: an option is wrong or the script is missing.
    """
    return Script(job, Options(**registry.checked("recipes.script", Options, job.recipe.options)))


class Script:
    """A program that leaves training to a process a site."""

    def __init__(self, job: Job, options: Options) -> None:
        self._job = job
        self._options = options
        self._path = job.path(options.path).absolute()
        if not self._path.is_file():
            siblings = [p.name for p in self._path.parent.glob("*.py")] if self._path.parent.is_dir() else []
            raise JobError(f"There is no script {str(self._path)!r}.{nearest(self._path.name, siblings)}")
        if options.timeout_s is not None and not options.timeout_s > 0:
            raise JobError(f"recipe.timeout_s must be above 0, it is {options.timeout_s}.")
        self._files = _site_files(job)
        self.sites: Sequence[str] = _site_names(options, self._files)
        self.traits = frozenset({Trait.OPAQUE_STEPS, Trait.STEPWISE})
        self._weights: dict[str, float] = {}
        self._processes: dict[tuple[str, str], _Process] = {}

    def initial(self) -> Tree:
        """Return what ``model.factory`` gives.

        Raises:
            ModelError: it gives no parameters.
        """
        factory = self._job.model.factory
        if factory is None:
            raise JobError(
                "A script needs its first parameters: set model.factory to FILE.py:CALLABLE "
                "(it returns a module or a state dict) or to a .safetensors file."
            )
        if factory.endswith(".safetensors"):
            path = self._job.path(factory)
            if not path.is_file():
                raise ModelError(f"There is no file {str(path)!r}, which model.factory names.")
            return storage.load_tree(path)
        return _made(self._job, factory)

    def inspect(self, site: str) -> SiteReport:
        """Check that the site's files are there; what is in them only the script knows."""
        for path in self._files.get(site, {}).values():
            if not path.exists():
                raise DataError(f"There is no data file {str(path)!r}.", site=site)
        return SiteReport(site, {})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        """Let the site's script train from ``plan.params``."""
        assert correction is None, "the fit check refuses strategies that act on steps"
        answer, params = self._exchange(site, plan, "train")
        if params is None:
            raise SiteError("The script sent no parameters: give FLModel(params=...) to send().", site=site)
        trained = _trained(plan.params, params, answer["params_type"], site)
        meta = answer["meta"]
        weight = meta.get("num_examples", meta.get("NUM_STEPS_CURRENT_ROUND", 1.0))
        if not 0 < weight < float("inf"):
            raise SiteError(f"The script's weight (in meta) is {weight}; it must be above 0.", site=site)
        self._weights[site] = weight
        count = max(1, int(meta.get("NUM_STEPS_CURRENT_ROUND", 1)))
        return Work(trained, weight, Steps(count, 0.0), _sums(answer["metrics"], weight))

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        """Return the metrics that the script gives for the received model, times the site's weight."""
        answer, _ = self._exchange(site, plan, "evaluate")
        weight = answer["meta"].get("num_examples", self._weights.get(site, 1.0))
        return _sums(answer["metrics"], weight)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return every metric's mean over the sites that sent it, by their weights."""
        return {name: value / sums[_COUNT.format(name)] for name, value in sums.items() if _COUNT.format(name) in sums}

    def export(self, params: Tree, directory: Path) -> None:
        """Write ``model/model.safetensors``, which holds the script's own state dict."""
        (directory / "model").mkdir(parents=True, exist_ok=True)
        storage.save_tree(directory / "model" / "model.safetensors", params)

    def show(self, params: Tree) -> Mapping[str, str]:
        """Return nothing: only the script knows what its model does."""
        return {}

    def close(self) -> None:
        """Tell every script that the federation has ended, and end those that don't return."""
        processes = list(self._processes.values())
        self._processes.clear()
        if processes:
            with ThreadPoolExecutor(len(processes)) as pool:
                list(pool.map(_Process.end, processes))

    def _exchange(self, site: str, plan: Plan, task: Task) -> tuple[dict[str, Any], dict[str, Array] | None]:
        if site == EVERYONE:
            raise JobError("A script trains on its own site's data only, so there is no central baseline.")
        deadline = self._job.cohort.deadline_s
        limit = self._options.timeout_s or (PATIENCE * deadline if deadline else None)
        message = {
            "type": "task",
            "task": task,
            "round": plan.round,
            "rounds": self._job.rounds,
            "meta": {
                "task": task,
                "seed": rng.derive(plan.seed, "script", plan.round, site) & 0xFFFFFFFF,
                "train": self._job.train.model_dump(mode="json"),
            },
        }
        key = self._key(site, plan.job, task)
        process = self._processes.get(key)
        try:
            if process is not None and process.running:
                try:
                    return process.exchange(message, plan.params, limit)
                except _ReturnedError:
                    process.kill()
            elif process is not None:
                process.kill()
            self._processes[key] = process = self._start(site, plan.job)
            return process.exchange(message, plan.params, limit)
        except BaseException as error:
            if process is not None:
                process.kill()
            self._processes.pop(key, None)
            if isinstance(error, OSError):
                raise SiteError(f"The local socket to the script failed: {error}.", site=site) from error
            raise

    def _key(self, site: str, course: str, task: Task) -> tuple[str, str]:
        """Return whose process takes the task: the course's own, or for an evaluation any of the site's."""
        key = (course, site)
        if task == "evaluate" and key not in self._processes:
            return next((other for other in self._processes if other[1] == site), key)
        return key

    def _start(self, site: str, course: str) -> _Process:
        own = self._job.engine.sites.get(site)
        threads = str((own and own.cpus) or self._job.engine.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
            **{f"HANSA_{kind.upper()}": str(path) for kind, path in self._files.get(site, {}).items()},
            **self._options.env,
        }
        command = [self._options.python or sys.executable, str(self._path), *self._options.args]
        return _Process(site, course, command, environment, self._job.path("."))


def _site_files(job: Job) -> dict[str, dict[str, Path]]:
    """Return site -> train, test -> path, where the job's data are a table of sites."""
    if job.partition is not None:
        raise JobError("Recipe 'script' can't divide data: leave the partition out, and let the script find its own.")
    if job.data is None:
        return {}
    files: dict[str, dict[str, Path]] = {}
    for kind, value in (("train", job.data.train), ("test", job.data.test)):
        if isinstance(value, dict):
            for site, path in value.items():
                files.setdefault(site, {})[kind] = job.path(path).absolute()
        elif value is not None:
            raise JobError(
                f"Recipe 'script' can't divide data.{kind}: write it as a table SITE = file, "
                "or leave data out and let the script find its own."
            )
    return files


def _site_names(options: Options, files: Mapping[str, Any]) -> tuple[str, ...]:
    sites = options.sites if options.sites is not None else list(files)
    if isinstance(sites, int):
        width = len(str(sites))
        sites = [f"site-{i:0{width}d}" for i in range(1, sites + 1)]
    if not sites:
        raise JobError("Recipe 'script' needs its sites: set recipe.sites to a number or to a list of names.")
    for name in sites:
        if not name or name == EVERYONE or not all(c.isalnum() or c in "._-" for c in name) or not name[0].isalnum():
            raise JobError(f"recipe.sites: {name!r} is no name for a site; use letters, digits, '.', '_' and '-'.")
    if len(set(sites)) < len(sites):
        raise JobError("recipe.sites names a site twice.")
    unknown = sorted(files.keys() - set(sites))
    if unknown:
        raise JobError(f"data names the site {unknown[0]!r}, which recipe.sites does not.{nearest(unknown[0], sites)}")
    return tuple(sorted(sites))


def _made(job: Job, factory: str) -> dict[str, Array]:
    """Call FILE.py:CALLABLE with the generators of NumPy and torch seeded, and return its parameters."""
    file, _, name = factory.rpartition(":")
    path = job.path(file)
    if not file or not path.is_file():
        raise JobError(
            f"model.factory is {factory!r}: write FILE.py:CALLABLE, with a file that exists, or a .safetensors file."
        )
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    seed = rng.derive(job.seed, "model")
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise JobError(f"model.factory is {factory!r}, and {path} has no callable {name!r}.")
        state = np.random.get_state()
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            made = _seeded_call(function, seed)
        finally:
            np.random.set_state(state)
    except HansaError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"model.factory {factory!r} failed: {type(error).__name__}: {error}") from error
    return _parameters(factory, made)


def _seeded_call(function: Any, seed: int) -> Any:
    if "torch" not in sys.modules:
        return function()
    from hansa.client.torch import seeded

    with seeded(seed):
        return function()


def _parameters(factory: str, made: Any) -> dict[str, Array]:
    values = made.state_dict() if hasattr(made, "state_dict") else made
    if not isinstance(values, Mapping) or not values:
        raise ModelError(
            f"model.factory {factory!r} returned {type(made).__name__}; it must return a module, a state dict, "
            "or a mapping of names to arrays that is not empty."
        )
    params = {}
    for name, value in values.items():
        if hasattr(value, "detach"):
            from hansa.client.torch import to_array

            params[str(name)] = to_array(value).copy()
        else:
            params[str(name)] = np.array(value)
        dtype = params[str(name)].dtype.name
        if dtype not in trees.dtype_names():
            raise ModelError(f"model.factory {factory!r} gives {name!r} in dtype {dtype}, which can't be shared.")
    return params


def _trained(start: Tree, sent: Tree, kind: str | None, site: str) -> dict[str, Array]:
    """Return the trained model, checked against what it started from."""
    unknown = sorted(sent.keys() - start.keys())
    if unknown:
        hint = nearest(unknown[0], start)
        raise SiteError(f"The script sent a tensor {unknown[0]!r}, which the shared model lacks.{hint}", site=site)
    result = dict(start)
    for name, before in start.items():
        if name in sent:
            result[name] = _after(name, before, sent[name], kind, site)
        elif trees.is_floating(before.dtype):
            raise SiteError(f"The script did not send the tensor {name!r}: send all that was received.", site=site)
    return result


def _after(name: str, before: Array, leaf: Array, kind: str | None, site: str) -> Array:
    if leaf.shape != before.shape:
        raise SiteError(
            f"The script sent {name!r} with shape {list(leaf.shape)}; it must be {list(before.shape)}.", site=site
        )
    if not trees.is_floating(before.dtype):
        return before if kind == "DIFF" or trees.is_floating(leaf.dtype) else leaf.astype(before.dtype)
    if kind == "DIFF":
        wide = trees.wide(before.dtype)
        return np.asarray(before.astype(wide, copy=False) + leaf.astype(wide, copy=False))
    return leaf


def _sums(metrics: Mapping[str, float], weight: float) -> dict[str, float]:
    sums = {}
    for name, value in metrics.items():
        sums[name] = value * weight
        sums[_COUNT.format(name)] = weight
    return sums


class _ReturnedError(SiteError):
    """The script ended without an error and without an answer."""


class _Process:
    """One running script, from its start to its end."""

    def __init__(
        self, site: str, course: str, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._site = site
        self._course = course
        self._link: Link | None = None
        self._busy = False
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._token = secrets.token_hex(16)
        self._place = Path(tempfile.mkdtemp(prefix="hansa-"))
        self._listener = socket.socket(socket.AF_UNIX)
        address = str(self._place / "s")
        try:
            self._listener.bind(address)
            self._listener.listen(1)
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, SOCKET_VARIABLE: address, TOKEN_VARIABLE: self._token},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._close_listener()
            raise JobError(
                f"The script can't be started ({shlex.join(command)}): {error.strerror}.", site=site
            ) from None
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def exchange(
        self, message: Mapping[str, Any], params: Tree, limit_s: float | None
    ) -> tuple[dict[str, Any], dict[str, Array] | None]:
        """Send a task and return the answer.

        Raises:
            SiteError: the script ended, or did not answer in time.
        """
        until = None if limit_s is None else time.monotonic() + limit_s
        self._busy = True
        try:
            link = self._link or self._connected(until)
            link.connection.settimeout(limit_s)
            link.send(message, params)
            self._wait(link.connection, until)
            answer = link.receive()
        except TimeoutError:
            raise SiteError(
                f"The script did not answer for {limit_s:g} s and was ended. Mend what it waits for, "
                f"or raise recipe.timeout_s.{self._last_lines()}",
                site=self._site,
            ) from None
        except ConnectionError:
            raise self._ended() from None
        self._busy = False
        return answer

    def end(self) -> None:
        """Say that the federation has ended, give the script a moment to return unless it trains, and end it."""
        if self._link is not None and self.running and not self._busy:
            try:
                self._link.connection.settimeout(_END_S)
                self._link.send({"type": "end"})
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
        if self._link is not None:
            self._link.close()
        self._close_listener()

    def _connected(self, until: float | None) -> Link:
        """Wait until the script has called ``init``."""
        while True:
            if select.select([self._listener], [], [], _POLL_S)[0]:
                break
            if not self.running:
                raise self._ended()
            if until is not None and time.monotonic() > until:
                raise TimeoutError
        connection, _ = self._listener.accept()
        self._close_listener()
        link = Link(connection)
        self._link = link
        hello, _ = link.receive()
        if hello.get("protocol") != PROTOCOL or not secrets.compare_digest(str(hello.get("token")), self._token):
            raise SiteError("The script runs with another release of hansa than this one.", site=self._site)
        link.send({"type": "welcome", "site": self._site, "job": self._course})
        return link

    @staticmethod
    def _wait(connection: socket.socket, until: float | None) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if not poll.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError

    def _ended(self) -> SiteError:
        """Return the error that says how the script ended."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return SiteError(f"The script closed its connection and went on.{self._last_lines()}", site=self._site)
        self._reader.join(1.0)
        if code == 0 and self._link is None:
            text = "The script ended without calling hansa.client.init(), so it takes no part."
            return SiteError(text + self._last_lines(), site=self._site)
        if code == 0:
            text = "The script returned before it answered: receive() and send() belong in while is_running()."
            return _ReturnedError(text + self._last_lines(), site=self._site)
        how = f"with exit code {code}" if code > 0 else f"by signal {-code}"
        return SiteError(f"The script ended {how}.{self._last_lines()}", site=self._site)

    def _last_lines(self) -> str:
        return f" Its last lines:\n    {'    '.join(self._tail).rstrip()}" if self._tail else ""

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace")
            self._tail.append(text)
            _LOG.info("%s: %s", self._site, text.rstrip())

    def _close_listener(self) -> None:
        self._listener.close()
        shutil.rmtree(self._place, ignore_errors=True)
