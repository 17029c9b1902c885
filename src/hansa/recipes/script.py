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
| a strategy that acts on steps (FedProx, SCAFFOLD) | needs ``steps = "prepared"``; else refused by the fit check |
| dp-sgd (:mod:`hansa.client.private`) | needs ``steps = "prepared"`` and ``examples``; no metrics of training, |
| | logged numbers or last lines of what it printed leave the site, and n is its weight |
| under one of these, the script sends an update without ``prepare`` or ``patch`` | no update in this round |
| ``launch = ["-m", "torch.distributed.run", ...]`` | several processes; rank 0 talks |
| what it logs in training | numbers go with the update, thinned to what an update carries (:mod:`hansa.core.values`); |
| | in an evaluation, and whatever is no number: to the site's log only |
| ``attached = true`` | nothing is started: a process that the owner runs by hand finds the job in |
| | ``attach/SITE`` (``attach`` is a folder; by default what HANSA_ATTACH_DIR names) |
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hansa import registry
from hansa.client.host import Attached, ReturnedError, Started
from hansa.client.link import PARAMS
from hansa.client.tracking import Log
from hansa.core import rng, storage
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE, Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Array, Tree
from hansa.core.values import Plan, Task
from hansa.errors import DataError, HansaError, JobError, ModelError, SiteError, nearest
from hansa.privacy.steps import NoisySteps, noisy_steps

PATIENCE = 5
"""How many of the cohort's deadlines a script may take for an answer, if the job gives no ``timeout_s``."""

ATTACH_DIR_VARIABLE = "HANSA_ATTACH_DIR"

_LOG = logging.getLogger("hansa.script")
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
        steps: "own", or "prepared" if the script takes its steps through ``prepare`` or ``patch``.
        examples: how many training examples each site's data set has, or a table SITE = number; dp-sgd's noise and ε
            follow from it.
        launch: what stands between the interpreter and the script, e.g. the module ``torch.distributed.run``.
        attached: whether the site's owner starts the process, instead of Hansa.
        attach: the folder in which attached processes look, one folder a site in it.
    """

    path: str
    sites: int | list[str] | None = None
    args: list[str] = field(default_factory=list)
    python: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    steps: Literal["own", "prepared"] = "own"
    examples: int | dict[str, int] | None = None
    launch: list[str] = field(default_factory=list)
    attached: bool = False
    attach: str | None = None


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
        counts = options.examples.values() if isinstance(options.examples, dict) else [options.examples]
        if any(count is not None and count < 1 for count in counts):
            raise JobError("recipe.examples must be above 0 for every site.")
        self._files = _site_files(job)
        self.sites: Sequence[str] = _site_names(options, self._files)
        seen = {Trait.BOUNDS_EXAMPLES} if options.steps == "prepared" else {Trait.OPAQUE_STEPS}
        self.traits = frozenset({Trait.STEPWISE, Trait.APART, *seen})
        self._noisy = noisy_steps(job)
        self._weights: dict[str, float] = {}
        self._processes: dict[tuple[str, str], Started | Attached] = {}
        self._logged: dict[str, Log] = {}

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
        """Check that the site's files are there; what is in them only the script knows, or the job says it."""
        for path in self._files.get(site, {}).values():
            if not path.exists():
                raise DataError(f"There is no data file {str(path)!r}.", site=site)
        told = self._options.examples is not None or self._noisy is not None
        return SiteReport(site, {"train": self._num_examples(site)} if told else {})

    def _num_examples(self, site: str) -> int:
        told = self._options.examples
        count = told.get(site) if isinstance(told, dict) else told
        if count is None:
            raise JobError(
                "Under dp-sgd the noise of a script's steps is measured for the number of its training examples: set "
                f"recipe.examples to a number, or to a table that has {site!r}.",
                site=site,
            )
        return count

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        """Let the site's script train from ``plan.params``."""
        self._logged[site] = log = Log()
        noisy = None if self._noisy is None else self._noisy(self._num_examples(site))
        answer, params = self._exchange(site, plan, "train", correction, noisy)
        if params is None:
            raise SiteError("The script sent no parameters: give FLModel(params=...) to send().", site=site)
        told = answer["steps"]
        if correction is not None and not (told and told["count"]):
            raise SiteError(
                f"The strategy {self._job.strategy.name!r} changes every local step, and this script took its steps "
                "out of sight. Call hansa.client.prepare(model, optimizer, loader) or patch(trainer) in it.",
                site=site,
            )
        told = told or {}
        trained = _trained(plan.params, params, answer["params_type"], site)
        if noisy is not None:
            return self._private(site, trained, noisy, answer)
        weight = _weight(answer)
        if not 0 < weight < float("inf"):
            raise SiteError(f"The script's weight (in meta) is {weight}; it must be above 0.", site=site)
        self._weights[site] = weight
        count = told.get("count") or max(1, int(answer["meta"].get("NUM_STEPS_CURRENT_ROUND", 1)))
        steps = Steps(count, told.get("lr_sum", 0.0))
        return Work(trained, weight, steps, _sums(answer["metrics"], weight), logged=log.numbers)

    def _private(self, site: str, trained: Tree, noisy: NoisySteps, answer: Mapping[str, Any]) -> Work:
        """Return a round of DP-SGD: nothing leaves but what was noised, and n."""
        made, told = answer["private"], answer["steps"]
        if not (told and made and 0 < made <= noisy.count):
            raise SiteError(
                f"The job is under dp-sgd, and {made or 0} of at most {noisy.count} steps were made by the optimizer "
                "and the loader that hansa.client.prepare(model, optimizer, loader) returns. Nothing is sent.",
                site=site,
            )
        if answer["metrics"]:
            _LOG.info("%s: the metrics that came with the update stay here: under dp-sgd no noise covers them", site)
        self._weights[site] = noisy.examples
        return Work(trained, noisy.examples, Steps(made, told["lr_sum"]), {})

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        """Return the metrics that the script gives for the received model, times the site's weight."""
        self._logged.pop(site, None)
        noisy = None if self._noisy is None else self._noisy(self._num_examples(site))
        answer, _ = self._exchange(site, plan, "evaluate", noisy=noisy)
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
                list(pool.map(lambda process: process.end(), processes))

    def _exchange(
        self,
        site: str,
        plan: Plan,
        task: Task,
        correction: Correction | None = None,
        noisy: NoisySteps | None = None,
    ) -> tuple[dict[str, Any], dict[str, Array] | None]:
        deadline = self._job.cohort.deadline_s
        limit = self._options.timeout_s or (PATIENCE * deadline if deadline else None)
        strategy = self._job.strategy
        message = {
            "type": "task",
            "task": task,
            "job": plan.job,
            "round": plan.round,
            "rounds": self._job.rounds,
            "meta": {
                "task": task,
                "seed": (noisy.seed if noisy else rng.derive(plan.seed, "script", plan.round, site)) & 0xFFFFFFFF,
                "train": self._job.train.model_dump(mode="json"),
            },
            "correction": {"name": strategy.name, "options": strategy.options} if correction is not None else None,
            "private": None if noisy is None else noisy.tell(),
        }
        parts = {PARAMS: plan.params, **(correction.context if correction is not None else {})}
        key = self._key(site, plan.job, task)
        process = self._processes.get(key)
        try:
            if process is not None and process.running:
                try:
                    return _answer(process.exchange(message, parts, limit), site)
                except ReturnedError:
                    _LOG.info("%s: the script has returned and is started anew", site)
            if process is not None:
                process.kill()
            self._processes[key] = process = self._open(site)
            return _answer(process.exchange(message, parts, limit), site)
        except OSError as error:
            raise SiteError(f"The local socket to the script failed: {error}.", site=site) from error
        finally:
            if process is not None and not process.running:
                self._processes.pop(key, None)

    def _key(self, site: str, course: str, task: Task) -> tuple[str, str]:
        """Return whose process takes the task: the course's own, or for an evaluation any of the site's.

        An attached process takes all of its site's.
        """
        key = (course, site)
        if (task == "evaluate" and key not in self._processes) or self._options.attached:
            return next((other for other in self._processes if other[1] == site), key)
        return key

    def _open(self, site: str) -> Started | Attached:
        if not self._options.attached:
            return self._start(site)
        folder = self._options.attach or os.environ.get(ATTACH_DIR_VARIABLE)
        if not folder:
            raise JobError(
                "recipe.attached needs a folder in which the sites' processes find the job: set recipe.attach, or "
                f"{ATTACH_DIR_VARIABLE} at the site."
            )
        return Attached(site, self._job.path(folder).absolute() / site, functools.partial(self._note, site))

    def _start(self, site: str) -> Started:
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
        interpreter = [self._options.python or sys.executable, *self._options.launch]
        command = [*interpreter, str(self._path), *self._options.args]
        telling = self._noisy is None
        return Started(site, command, environment, self._job.path("."), functools.partial(self._note, site), telling)

    def _note(self, site: str, entry: Mapping[str, Any]) -> None:
        """Write what the script gave to ``log`` into the site's log, as JSON, and keep its numbers for the update."""
        kept = {name: entry.get(name) for name in ("key", "value", "data_type", "with")}
        _LOG.info("%s: %s", site, json.dumps({"logged": kept}))
        if site in self._logged:
            self._logged[site].add(entry)


def _answer(found: tuple[dict[str, Any], dict[str, dict[str, Array]]], site: str) -> tuple[Any, Any]:
    """Return the script's message and parameters, checked for their form."""
    message, parts = found
    try:
        metrics = {str(name): float(value) for name, value in message["metrics"].items()}
        meta = {str(name): float(value) for name, value in message["meta"].items()}
        told = message["steps"]
        steps = told and {
            "count": int(told["count"]),
            "lr_sum": float(told["lr_sum"]),
            "num_examples": told["num_examples"] and int(told["num_examples"]),
        }
        private = message.get("private")
        made = None if private is None else int(private)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SiteError(f"The script's answer has another form than this release's ({error!r}).", site=site) from None
    kind = message.get("params_type")
    checked = {"metrics": metrics, "meta": meta, "steps": steps, "private": made, "params_type": kind}
    return checked, parts.get(PARAMS)


def _weight(answer: Mapping[str, Any]) -> float:
    """Return what the site's update is weighed by: the script's word, else what its steps tell, else 1."""
    meta, steps = answer["meta"], answer["steps"] or {}
    for told in (meta.get("num_examples"), meta.get("NUM_STEPS_CURRENT_ROUND")):
        if told is not None:
            return float(told)
    return float(steps.get("num_examples") or steps.get("count") or 1)


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
