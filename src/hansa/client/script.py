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
| weight of a site | ``meta["num_examples"]``, or else ``meta["NUM_STEPS_CURRENT_ROUND"]``, or else 1 |
| ``metrics`` | of the model as received, averaged over sites by their weights |
| ``current_round`` | counts from 0, to ``total_rounds - 1`` |
| ``is_evaluate()`` | this time only metrics are used; a script that trains all the same does no harm |
| ``meta["seed"]`` | a 32-bit seed for this site and round: with it, the same job gives the same model |
| the federation ends | ``is_running()`` is False; clean up and return |
| the process that started the script is gone | the script is ended, in the middle of a step too |
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from hansa.client.link import PROTOCOL, SOCKET_VARIABLE, TOKEN_VARIABLE, Link
from hansa.core import tree as trees
from hansa.core.tree import Array
from hansa.errors import JobError, SiteError

Kind = Literal["numpy", "torch"]


class ParamsType(StrEnum):
    """Whether parameters are a whole model or what training added to one."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass
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


class _Session:
    """The script's side of the link: which task it is at."""

    def __init__(self, link: Link, welcome: Mapping[str, Any], tensors: Kind | None) -> None:
        self.site: str = welcome["site"]
        self.job: str = welcome["job"]
        self.task: str | None = None
        self.tensors = tensors
        self._link = link
        self._model: FLModel | None = None
        self._ended = False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """End the script when the process that started it is gone."""
        poll = select.poll()
        poll.register(self._link.connection.fileno(), 0)  # a hang-up is told without being asked for
        poll.poll()
        if not self._ended:
            with contextlib.suppress(OSError, ValueError):  # whoever read what the script prints may be gone, too
                print("hansa.client: the process that runs the federation is gone; the script ends.", file=sys.stderr)
                sys.stderr.flush()
            os._exit(1)

    def wait(self) -> bool:
        """Wait for the next task unless there is one; return False when there are no more."""
        if self._model is not None or self._ended:
            return not self._ended
        message, params = self._link.receive()
        if message["type"] == "end":
            self._ended = True
            return False
        self.task = message["task"]
        self._model = FLModel(
            params_type=ParamsType.FULL,
            params=_received(params or {}, self.tensors),
            current_round=message["round"] - 1,
            total_rounds=message["rounds"],
            meta=message["meta"],
        )
        return True

    def receive(self) -> FLModel:
        if not self.wait():
            raise SiteError("The federation has ended, so there is no model to receive. Ask is_running() first.")
        assert self._model is not None
        return self._model

    def send(self, model: FLModel) -> None:
        if self._model is None:
            raise SiteError("There is nothing to answer: call receive() before each send().")
        if model.optimizer_params is not None:
            warnings.warn("optimizer_params stay at the site; only params are sent.", stacklevel=3)
        kind = model.params_type
        message = {
            "type": "result",
            "params_type": None if model.params is None or kind is None else ParamsType(kind).value,
            "metrics": {name: _number(f"metrics[{name!r}]", value) for name, value in (model.metrics or {}).items()},
            "meta": {
                name: _number(f"meta[{name!r}]", model.meta[name])
                for name in ("num_examples", "NUM_STEPS_CURRENT_ROUND")
                if model.meta.get(name) is not None
            },
        }
        self._link.send(message, None if model.params is None else _sent(model.params))
        self._model = None
        self.task = None


_session: _Session | None = None


def init(*, tensors: Kind | None = None) -> None:
    """Connect to the federation; a second call changes nothing.

    Args:
        tensors: what ``receive`` gives, ``"numpy"`` or ``"torch"``; by default torch tensors if the script has
            imported torch, else NumPy arrays.

    Raises:
        JobError: this process was not started by Hansa.
    """
    global _session
    if _session is not None:
        return
    path, token = os.environ.get(SOCKET_VARIABLE), os.environ.get(TOKEN_VARIABLE)
    if not path or token is None:
        raise JobError(
            "This script was not started by Hansa. Name it in a job (recipe = { name = 'script', path = 'FILE.py' }) "
            "and start that with: hansa run JOB.toml"
        )
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        link = Link(connection)
        link.send({"type": "hello", "protocol": PROTOCOL, "token": token})
        welcome, _ = link.receive()
    except OSError as error:
        raise JobError(
            f"Hansa can't be reached over its local socket ({error}): the run has ended, or another process of this "
            "script has called init() before. Call it once, in one process."
        ) from None
    _session = _Session(link, welcome, tensors)


def is_running() -> bool:
    """Wait for the next model; return False when the federation has ended."""
    return _current().wait()


def receive() -> FLModel:
    """Return the shared model of this round; the same again until :func:`send`.

    Raises:
        SiteError: the federation has ended.
    """
    return _current().receive()


def send(model: FLModel) -> None:
    """Send what training gave. Only ``params``, ``params_type``, ``metrics`` and the weight in ``meta`` leave.

    Raises:
        SiteError: no model was received for this.
        JobError: a parameter or metric is nothing that can be sent.
    """
    _current().send(model)


def is_train() -> bool:
    """Say whether the received model is to be trained."""
    session = _current()
    session.wait()
    return session.task == "train"


def is_evaluate() -> bool:
    """Say whether the received model is only to be judged: metrics are used, parameters are not."""
    session = _current()
    session.wait()
    return session.task == "evaluate"


def get_site_name() -> str:
    """Return this site's name."""
    return _current().site


def get_job_id() -> str:
    """Return the name of the job, or of the baseline, that this script works for."""
    return _current().job


def system_info() -> dict[str, str]:
    """Return ``site_name`` and ``job_id``."""
    session = _current()
    return {"site_name": session.site, "job_id": session.job}


def _current() -> _Session:
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
