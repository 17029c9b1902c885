# SPDX-License-Identifier: Apache-2.0
"""The client API: what a training script of one's own calls to take part in a federation.

    import hansa.client as flare

    flare.init()
    while flare.is_running():
        received = flare.receive()                     # the shared model of this round
        ...                                            # train as ever, starting from received.params
        flare.send(flare.FLModel(params=..., metrics={"accuracy": ...}, meta={"NUM_STEPS_CURRENT_ROUND": steps}))

Names and meanings follow the client API of NVIDIA FLARE, so that a script for it needs its import changed.

| what | rule |
|---|---|
| arrays or tensors | torch tensors are received if the script has imported torch by then, else NumPy arrays |
| | (``init(tensors=...)`` fixes it) |
| what may be sent | NumPy arrays, torch tensors (on any device), numbers; a mapping from the names that came |
| ``params_type`` | FULL is the trained model (the default), DIFF is trained minus received |
| weight of a site | ``meta["num_examples"]``, or else ``meta["NUM_STEPS_CURRENT_ROUND"]``, or else what |
| | ``prepare`` or ``patch`` counted, or else 1 |
| ``metrics`` | of the model as received, averaged over sites by their weights |
| ``current_round`` | counts from 0, to ``total_rounds - 1`` |
| ``is_evaluate()`` | this time only metrics are used; a script that trains all the same does no harm |
| ``is_submit_model()`` | never: no workflow of Hansa asks a site for a model that it kept |
| ``meta["seed"]`` | a 32-bit seed for this site and round: with it, the same job gives the same model |
| ``log`` | goes to the site's own log; numbers logged in training also travel with the round's update |
| a job under dp-sgd | only what ``prepare`` trained may be sent, and without metrics (:mod:`hansa.client.private`); |
| | metrics that are sent when ``is_evaluate()`` leave |
| the federation ends | ``is_running()`` is False; clean up and return |
| the process that started the script is gone | the script is ended, in the middle of a step too; on every rank |
| an attached process (``init(attach=...)``) | waits for a job, and outlives it: the next ``receive`` waits again |
| several processes (``torchrun``) | rank 0 talks; all ranks call ``is_running`` once a round; on the others |
| | ``receive`` returns None, and ``send`` and ``log`` do nothing |
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hansa.client import ranks
from hansa.client.link import (
    ATTACH_VARIABLE,
    PARAMS,
    PROTOCOL,
    SOCKET_FILE,
    SOCKET_VARIABLE,
    TOKEN_FILE,
    TOKEN_VARIABLE,
    Link,
)
from hansa.core import tree as trees
from hansa.core.tree import Array, Parts
from hansa.errors import JobError, PrivacyError, SiteError

if TYPE_CHECKING:
    from hansa.client.private import PrivateSteps
    from hansa.client.steps import Stepping

Kind = Literal["numpy", "torch"]

_LOOK_S = 0.2
_SIGN_OF_LIFE_S = 60.0


class ParamsType(StrEnum):
    """Whether parameters are a whole model or what training added to one."""

    FULL = "FULL"
    DIFF = "DIFF"


class AnalyticsDataType(StrEnum):
    """What :func:`log` is given; Hansa keeps the numbers and the text, whatever their type is called."""

    SCALAR = "SCALAR"
    SCALARS = "SCALARS"
    IMAGE = "IMAGE"
    TEXT = "TEXT"
    LOG_RECORD = "LOG_RECORD"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"
    INIT_DATA = "INIT_DATA"


@dataclass(repr=False)
class FLModel:
    """What travels between the federation and a script.

    Attributes:
        params_type: FULL or DIFF; FULL if there are ``params`` and it is left out.
        params: name -> array or tensor, as in ``module.state_dict()``.
        optimizer_params: kept for scripts that set it; it never leaves the site.
        metrics: name -> number, of the received model.
        start_round: 0.
        current_round: this round's number, from 0.
        total_rounds: how many rounds the job has.
        meta: everything else, by name.
    """

    params_type: ParamsType | str | None = None
    params: Any = None
    optimizer_params: Any = None
    metrics: Mapping[str, Any] | None = None
    start_round: int | None = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.params_type is None:
            self.params_type = None if self.params is None else ParamsType.FULL
        else:
            self.params_type = ParamsType(self.params_type)
        self.meta = dict(self.meta or {})

    def summary(self) -> dict[str, Any]:
        """Return what the model holds, with the number of parameters in their place."""
        size = {} if self.params is None else {"params": len(self.params)}
        rest = {name: value for name, value in vars(self).items() if name not in ("params", "optimizer_params")}
        return {name: value for name, value in {**rest, **size}.items() if value not in (None, {})}

    def __repr__(self) -> str:
        return f"FLModel({', '.join(f'{name}={value!r}' for name, value in self.summary().items())})"


@dataclass(frozen=True)
class Assignment:
    """A task as every rank knows it: all but the tensors."""

    number: int
    task: str
    job: str
    round: int
    rounds: int
    meta: Mapping[str, Any]
    correction: Mapping[str, Any] | None
    private: Mapping[str, Any] | None = None
    """The draws of this round's DP-SGD (:meth:`hansa.privacy.steps.NoisySteps.tell`), where the job promises that."""


class Session:
    """The script's side of the link: which task it is at. Only rank 0 has a link."""

    def __init__(
        self,
        link: Link | None,
        welcome: Mapping[str, Any],
        tensors: Kind | None = None,
        *,
        rank: int = 0,
        again: Callable[[], tuple[Link, Mapping[str, Any]]] | None = None,
    ) -> None:
        self.site: str = welcome["site"]
        self.rank = rank
        self.tensors = tensors
        self.turn = 0
        self.assignment: Assignment | None = None
        self.context: Parts = {}
        self.stepping: Stepping | None = None
        self.private: PrivateSteps | None = None
        self.received: dict[str, Array] = {}
        """The parameters as they came, where no script can change them; kept under dp-sgd only."""
        self._link = link
        self._again = again
        self._model: FLModel | None = None
        self._answered = True
        self._ended = False
        self._sending = threading.Lock()
        if link is not None and again is None:
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def _watch(self, link: Link) -> None:
        """End the script when the process that started it is gone."""
        poll = select.poll()
        poll.register(link.connection.fileno(), 0)  # a hang-up is told without being asked for
        poll.poll()
        if not self._ended:
            with contextlib.suppress(OSError, ValueError):  # whoever read what the script prints may be gone, too
                print("hansa.client: the process that runs the federation is gone; the script ends.", file=sys.stderr)
                sys.stderr.flush()
            os._exit(1)

    @property
    def task(self) -> str | None:
        """What the model at hand is for; None between tasks."""
        return self.assignment.task if self.assignment is not None and not self._answered else None

    def agree(self) -> bool:
        """Wait for the next task unless one is at hand, and return False when there are no more.

        With several processes it is collective; those that wait are told every minute that rank 0 waits, too.
        """
        if ranks.world() == 1:
            running = bool(self.wait()) if self.rank == 0 else not self._ended
        else:
            running = self._agreed()
        self.turn += 1
        return running

    def _agreed(self) -> bool:
        while True:
            state: dict[str, Any] = {}
            if self.rank == 0:
                waiting = self.wait(_SIGN_OF_LIFE_S) is None
                state = {"waiting": waiting, "ended": self._ended, "task": vars(self.assignment or _NONE)}
            state = ranks.share(state)
            if not state["waiting"]:
                break
        if self.rank != 0:
            self._ended = state["ended"]
            self.assignment, self._answered = Assignment(**state["task"]), False
        return not self._ended

    def wait(self, timeout: float | None = None) -> bool | None:
        """Wait for the next task as :meth:`agree` does, alone; return None if none came within ``timeout`` seconds."""
        if self._model is not None or self._ended or self._link is None:
            return not self._ended
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if until is not None and not self._link.ready(until - time.monotonic()):
                return None
            try:
                message, parts = self._link.receive()
                break
            except ConnectionError:
                if self._again is None:
                    raise
                self._link.close()
                self._link, _ = self._again()
        if message["type"] == "end":
            self._ended = True
            return False
        self._take(message, parts)
        return True

    def _take(self, message: Mapping[str, Any], parts: dict[str, dict[str, Array]]) -> None:
        self.context = {part: tree for part, tree in parts.items() if part != PARAMS}
        self.assignment = Assignment(
            (self.assignment or _NONE).number + 1,
            *(message[name] for name in ("task", "job", "round", "rounds", "meta", "correction", "private")),
        )
        self._answered = False
        private = self.assignment.private is not None and self.assignment.task == "train"
        self.received = {name: leaf.copy() for name, leaf in parts.get(PARAMS, {}).items()} if private else {}
        self._model = FLModel(
            params_type=ParamsType.FULL,
            params=_received(parts.get(PARAMS, {}), self.tensors),
            current_round=message["round"] - 1,
            total_rounds=message["rounds"],
            meta=dict(message["meta"]),
        )

    def receive(self, timeout: float | None = None) -> FLModel | None:
        """Return the model at hand, waiting for it; None after ``timeout`` seconds, and on all ranks but 0."""
        if self.rank != 0:
            return None
        if self.wait(timeout) is False:
            raise SiteError("The federation has ended, so there is no model to receive. Ask is_running() first.")
        return self._model

    def send(self, model: FLModel, clear_cache: bool = True) -> None:
        """Answer the task at hand."""
        if not isinstance(model, FLModel):
            raise JobError(f"send() takes an FLModel, not a {type(model).__name__}.")
        if self.rank != 0:
            self._answered = True
            return
        if self._answered or self._link is None:
            raise SiteError("There is nothing to answer: call receive() before each send().")
        if model.optimizer_params is not None:
            warnings.warn("optimizer_params stay at the site; only params are sent.", stacklevel=3)
        kind = model.params_type
        message: dict[str, Any] = {
            "type": "result",
            "params_type": None if model.params is None or kind is None else ParamsType(kind).value,
            "metrics": {name: _number(f"metrics[{name!r}]", value) for name, value in (model.metrics or {}).items()},
            "meta": {
                name: _number(f"meta[{name!r}]", model.meta[name])
                for name in ("num_examples", "NUM_STEPS_CURRENT_ROUND")
                if model.meta.get(name) is not None
            },
            "steps": None if self.stepping is None else self.stepping.taken(),
        }
        params = None if model.params is None else _sent(model.params)
        if self.received:
            message["private"] = self._check_private(params, kind)
            if model.metrics:
                warnings.warn("Under dp-sgd metrics are not sent with an update: no noise covers them.", stacklevel=3)
        self._tell(message, None if params is None else {PARAMS: params})
        self.received = {}
        self._answered = True
        if clear_cache:
            self.clear()

    def _check_private(self, params: Mapping[str, Array] | None, kind: ParamsType | str | None) -> int:
        """Return how many steps of DP-SGD made ``params``.

        Raises:
            PrivacyError: none did, or something else had a hand in them.
        """
        if params is None or self.private is None:
            raise PrivacyError(
                "The job is under dp-sgd, so the model that is sent must have been trained with the optimizer and the "
                "loader of hansa.client.prepare(model, optimizer, loader)."
            )
        return self.private.check_sent(params, kind)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Send a line for the site's log."""
        self._tell({"type": "log", **entry})

    def _tell(self, message: Mapping[str, Any], parts: Parts | None = None) -> None:
        assert self._link is not None
        try:
            with self._sending:
                self._link.send(message, parts)
        except ConnectionError:
            if self._again is None:
                raise
            print("hansa.client: the job's process is gone; what was to be sent is lost.", file=sys.stderr)

    def clear(self) -> None:
        """Let go of the model at hand."""
        if self._answered:
            self._model = None
            self.context = {}

    def shutdown(self) -> None:
        """Leave the federation."""
        self._ended = True
        if self._link is not None:
            self._link.close()


_NONE = Assignment(0, "", "", 0, 0, {}, None)
_session: Session | None = None


def init(
    rank: str | int | None = None,
    config_file: str | None = None,
    *,
    tensors: Kind | None = None,
    attach: str | os.PathLike[str] | None = None,
) -> None:
    """Connect to the federation; a second call changes nothing.

    Args:
        rank: of several processes, which this is; by default what the launcher has set in RANK. Only 0 connects.
        config_file: FLARE's; Hansa needs none, and does not read it.
        tensors: what ``receive`` gives, ``"numpy"`` or ``"torch"``; by default torch tensors if the script has
            imported torch, else NumPy arrays.
        attach: for a process started by hand: the folder in which the site's jobs look for it; HANSA_ATTACH by
            default. A process that Hansa started does not look at it.

    Raises:
        JobError: this process was not started by Hansa, and was given no folder.
    """
    global _session
    if _session is not None:
        return
    number = ranks.own(rank)
    path, token = os.environ.get(SOCKET_VARIABLE), os.environ.get(TOKEN_VARIABLE)
    folder = attach or os.environ.get(ATTACH_VARIABLE)
    if number != 0:
        if path:
            threading.Thread(target=_watch_launcher, daemon=True).start()
        _session = Session(None, {"site": ""}, tensors, rank=number)
    elif path and token is not None:
        try:
            link, welcome = _connected(path, token)
        except OSError as error:
            raise JobError(
                f"Hansa can't be reached over its local socket ({error}): the run has ended, or another process of "
                "this script has called init() before. Call it once, in one process."
            ) from None
        _session = Session(link, welcome, tensors)
    elif folder:
        again = functools.partial(_attached, Path(folder))
        link, welcome = again()
        _session = Session(link, welcome, tensors, again=again)
    else:
        raise JobError(
            "This script was not started by Hansa. Name it in a job (recipe = { name = 'script', path = 'FILE.py' }) "
            f"and start that with: hansa run JOB.toml. To attach it to a site's job, give the folder of that job in "
            f"{ATTACH_VARIABLE}, or call init(attach=FOLDER)."
        )


def _watch_launcher() -> None:
    """End this process when the one that launched it (``torchrun``) is gone; only rank 0 has a link that tells."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(os.pidfd_open(os.getppid()), select.POLLIN)
        poll.poll()
        os._exit(1)


def _connected(path: str, token: str) -> tuple[Link, Mapping[str, Any]]:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        link = Link(connection)
        link.send({"type": "hello", "protocol": PROTOCOL, "token": token})
        welcome, _ = link.receive()
    except BaseException:  # no socket stays open, Ctrl-C included
        connection.close()
        raise
    return link, welcome


def _attached(folder: Path) -> tuple[Link, Mapping[str, Any]]:
    """Wait until a job takes this process in."""
    said = False
    while True:
        try:
            return _connected(str(folder / SOCKET_FILE), (folder / TOKEN_FILE).read_text())
        except (FileNotFoundError, ConnectionError):
            if not said:
                print(f"hansa.client: waiting for a job at {folder}", file=sys.stderr, flush=True)
            said = True
            time.sleep(_LOOK_S)
        except OSError as error:
            raise JobError(f"No job can be reached at {str(folder)!r}: {error}.") from None


def is_running() -> bool:
    """Wait for the next model; return False when the federation has ended."""
    return current().agree()


def receive(timeout: float | None = None) -> FLModel | None:
    """Return the shared model of this round; the same again until :func:`send`.

    Returns None if none has come within ``timeout`` seconds, and on every rank but 0.

    Raises:
        SiteError: the federation has ended.
    """
    return current().receive(timeout)


def send(model: FLModel, clear_cache: bool = True) -> None:
    """Send what training gave. Only ``params``, ``params_type``, ``metrics`` and the weight in ``meta`` leave.

    Args:
        model: the answer.
        clear_cache: False keeps the received model for :func:`receive`, until :func:`clear`.

    Raises:
        SiteError: no model was received for this.
        JobError: a parameter or metric is nothing that can be sent.
    """
    current().send(model, clear_cache)


def clear() -> None:
    """Let go of a received model that was kept by ``send(..., clear_cache=False)``."""
    current().clear()


def shutdown() -> None:
    """Leave the federation. An attached process may call :func:`init` again, for the next job."""
    global _session
    current().shutdown()
    _session = None


def is_train() -> bool:
    """Say whether the received model is to be trained."""
    return get_task_name() == "train"


def is_evaluate() -> bool:
    """Say whether the received model is only to be judged: metrics are used, parameters are not."""
    return get_task_name() == "evaluate"


def is_submit_model() -> bool:
    """Say whether a model that the site kept is asked for; no workflow of Hansa does that."""
    return get_task_name() == "submit_model"


def get_task_name() -> str:
    """Return ``train`` or ``evaluate``: what the model at hand is for, or else what the last one was for."""
    return _assignment().task


def get_site_name() -> str:
    """Return this site's name; an empty text on every rank but 0."""
    return current().site


def get_job_id() -> str:
    """Return the name of the job, or of the baseline, that this script works for."""
    return _assignment().job


def _assignment() -> Assignment:
    session = current()
    if session.assignment is None:
        session.wait()
    return session.assignment or _NONE


def system_info() -> dict[str, str]:
    """Return ``site_name`` and ``job_id``."""
    return {"site_name": get_site_name(), "job_id": get_job_id()}


def get_config() -> dict[str, Any]:
    """Return what FLARE's scripts look up of their set-up."""
    tensors = current().tensors or ("pytorch" if "torch" in sys.modules else "numpy")
    return {
        "SITE_NAME": get_site_name(),
        "JOB_ID": get_job_id(),
        "TASK_EXCHANGE": {
            "train_with_evaluation": True,
            "exchange_format": "pytorch" if tensors == "torch" else tensors,
            "transfer_type": ParamsType.FULL.value,
            "train_task_name": "train",
            "eval_task_name": "evaluate",
            "submit_model_task_name": "submit_model",
        },
    }


def log(key: str, value: Any, data_type: AnalyticsDataType | str, **kwargs: Any) -> bool:
    """Write a number, a text, or a table of them to the site's log.

    Numbers (SCALAR, SCALARS, METRIC, METRICS) that are logged in training also travel with the update, as far as it
    carries them (:mod:`hansa.client.tracking`); all else stays at the site.

    Args:
        key: its name.
        value: what to log. An image, a model or the like is not kept.
        data_type: what ``value`` is.
        kwargs: what stands beside it, e.g. ``global_step``.

    Returns:
        whether it was written.
    """
    session = current()
    if session.rank != 0:
        return False
    try:
        entry = {
            "key": str(key),
            "value": _plain(value),
            "data_type": AnalyticsDataType(data_type).value,
            "with": _plain({name: extra for name, extra in kwargs.items() if extra is not None}),
        }
    except TypeError:
        warnings.warn(f"log({key!r}) keeps numbers and text only; a {type(value).__name__} is neither.", stacklevel=2)
        return False
    session.log(entry)
    return True


def train(_func: Callable[..., Any] | None = None, **root_kwargs: Any) -> Any:
    """Decorate a function ``(model, ...) -> FLModel``: its first argument is received, what it returns is sent."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            global _judged
            given = _with_model(function, args, kwargs)
            result = function(**given)
            if not isinstance(result, FLModel):
                raise JobError(
                    f"{function.__name__}() returned a {type(result).__name__}; under @train it returns an FLModel."
                )
            if _judged is not None:
                result.metrics, _judged = _judged, None
            send(result)
            return result

        return wrapper

    return decorator if _func is None else decorator(_func)


def evaluate(_func: Callable[..., Any] | None = None, **root_kwargs: Any) -> Any:
    """Decorate a function ``(model, ...) -> metrics``, a number or a table of them, of the received model.

    Call it before the one under :func:`train`; its metrics are sent together with the trained model.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            global _judged
            given = _with_model(function, args, kwargs)
            result = function(**given)
            if result is None:
                raise JobError(f"{function.__name__}() returned nothing; under @evaluate it returns metrics.")
            metrics = result if isinstance(result, Mapping) else {"metric": result}
            if is_evaluate():
                send(FLModel(metrics=metrics))
            else:
                _judged = metrics
            return result

        return wrapper

    return decorator if _func is None else decorator(_func)


_judged: Mapping[str, Any] | None = None


def _with_model(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, with the received model as the first."""
    names = list(inspect.signature(function).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs, names[0]: receive()}


def current() -> Session:
    """Return this process's session.

    Raises:
        JobError: there is none yet.
    """
    if _session is None:
        raise JobError("Call hansa.client.init() first.")
    return _session


def _received(params: Mapping[str, Array], tensors: Kind | None) -> dict[str, Any]:
    if tensors == "numpy" or (tensors is None and "torch" not in sys.modules):
        return dict(params)
    from hansa.client.torch import to_tensor

    return {name: to_tensor(leaf) for name, leaf in params.items()}


def _sent(params: Any) -> dict[str, Array]:
    if not isinstance(params, Mapping):
        raise JobError(
            f"FLModel.params is a {type(params).__name__}; give a mapping of names to arrays or tensors, "
            "as module.state_dict() returns it."
        )
    return {str(name): _array(str(name), leaf) for name, leaf in params.items()}


def _array(name: str, leaf: Any) -> Array:
    if hasattr(leaf, "detach"):
        from hansa.client.torch import to_array

        array = to_array(leaf)
    else:
        array = np.asarray(leaf)
    if array.dtype.name not in trees.dtype_names():
        raise JobError(
            f"Parameter {name!r} is {type(leaf).__name__} of dtype {array.dtype}, which can't be sent. "
            f"Known dtypes: {', '.join(trees.dtype_names())}."
        )
    return array


def _number(where: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise JobError(f"{where} is a {type(value).__name__}; only numbers can be sent there.") from None


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; TypeError if it can't."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if getattr(value, "size", None) == 1 or getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(type(value).__name__)
