# SPDX-License-Identifier: Apache-2.0
"""A PyTorch Lightning trainer in a federation; it mirrors ``nvflare.client.lightning``.

    import hansa.client.lightning as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, data)      # metrics of the model as received
        trainer.fit(model, data)           # from the received model; what it gives is sent

| case | result |
|---|---|
| ``fit`` | loads the received model, trains, sends it with the metrics of ``validate`` and the steps it made |
| ``validate`` outside ``fit`` | loads the received model; its numbers are the round's metrics |
| no ``validate`` before ``fit`` | no metrics are sent; what ``fit`` validates by itself is of another model |
| the round only evaluates | ``validate`` sends the metrics, and ``fit`` does nothing |
| optimisers and schedulers | go on from where the last round left them, or start anew (``restore_state=False``); |
| | after a crash of the process they start anew |
| ``max_epochs``, ``max_steps`` | are meant a round (``update_fit_loop=False`` leaves them to the script) |
| random numbers | seeded at ``fit`` from ``meta["seed"]`` and the rank |
| FedProx, SCAFFOLD | work with automatic and manual optimisation (``recipe.steps = "prepared"``); one optimiser |
| a job under dp-sgd | PrivacyError that names ``prepare`` |
| several processes | DDP and FSDP under ``torchrun``: rank 0 talks, the others are sent what it received |
| on CPUs | ``ModelParallelStrategy`` shards, if it is given its ``data_parallel_size``; ``FSDPStrategy`` is for GPUs |
| ``module.__fl_meta__`` | a mapping that is sent as ``meta`` |
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hansa.client import models, ranks
from hansa.client.private import refuse
from hansa.client.script import (
    AnalyticsDataType,
    FLModel,
    ParamsType,
    Session,
    clear,
    current,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
)
from hansa.client.steps import Stepping
from hansa.errors import JobError

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

__all__ = [
    "AnalyticsDataType",
    "FLCallback",
    "FLModel",
    "ParamsType",
    "clear",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

FL_META_KEY = "__fl_meta__"


def patch(
    trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> None:
    """Make ``trainer`` take part in the federation; a second call changes nothing. Calls ``init`` if need be.

    Args:
        trainer: a Lightning Trainer (of ``lightning`` or of ``pytorch_lightning``).
        restore_state: whether optimisers and schedulers go on from round to round.
        load_state_dict_strict: whether the received model must have every tensor of the module.
        update_fit_loop: whether ``max_epochs`` and ``max_steps`` are meant a round.
    """
    init()
    if any(isinstance(callback, FLCallback) for callback in trainer.callbacks):
        return
    callback = FLCallback(current(), restore_state, load_state_dict_strict, update_fit_loop)
    trainer.callbacks.append(callback)
    fit = trainer.fit

    @functools.wraps(fit)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        return None if callback.judged else fit(*args, **kwargs)

    trainer.fit = in_turn


class FLCallback(Callback):  # type: ignore[misc]
    """What :func:`patch` adds to a trainer."""

    def __init__(self, session: Session, restore_state: bool, strict: bool, update_fit_loop: bool) -> None:
        self._session = session
        self._restore = restore_state
        self._strict = strict
        self._update = update_fit_loop
        self._kept: list[Any] | None = None
        self._limits: tuple[int | None, int] | None = None
        self._loaded: int | None = None
        self._metrics: dict[str, float] = {}
        self._judged_turn: int | None = None

    @property
    def judged(self) -> bool:
        """Whether the task at hand was to evaluate, and has been answered."""
        return self._judged_turn is not None and self._judged_turn == self._session.turn

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the received model, seed, and put the optimisers' state back."""
        meta = self._load(trainer, pl_module)
        refuse(self._session, "Lightning fetches examples ahead of the step that they belong to")
        seed = (int(meta["seed"]) + ranks.own()) & 0xFFFFFFFF
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        if len(trainer.optimizers) != 1 and self._session.assignment is not None:
            if self._session.assignment.correction is not None:
                raise JobError("A strategy that acts on steps needs a module with one optimiser.")
        elif trainer.optimizers:
            Stepping(self._session, _model(trainer, pl_module), trainer.optimizers[0])
        if self._restore and self._kept is not None:
            for owner, state in zip(_stateful(trainer), self._kept, strict=True):
                owner.load_state_dict(state)
        loop = trainer.fit_loop
        if self._limits is None:
            self._limits = (loop.max_epochs, loop.epoch_loop.max_steps)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the received model, outside ``fit``."""
        if trainer.state.fn == "validate":
            self._load(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the metrics; in a round that only evaluates, send them."""
        if trainer.state.fn != "validate":
            return
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._session.task == "evaluate":
            self._session.send(FLModel(metrics=self._metrics, meta=_meta(pl_module)))
            self._judged_turn = self._session.turn
            self._loaded = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Send the trained model."""
        state = models.gathered(_model(trainer, pl_module))
        if self._restore:
            self._kept = [owner.state_dict() for owner in _stateful(trainer)]
        stepping = self._session.stepping
        steps = stepping.count if stepping is not None else trainer.global_step
        meta = {"NUM_STEPS_CURRENT_ROUND": max(1, steps), **_meta(pl_module)}
        self._session.send(FLModel(ParamsType.FULL, state, metrics=self._metrics, meta=meta))
        self._metrics, self._loaded = {}, None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make room for the next round's epochs or steps."""
        if self._update and self._limits is not None:
            loop, (epochs, count) = trainer.fit_loop, self._limits
            if epochs not in (None, -1):
                loop.max_epochs = loop.epoch_progress.current.processed + epochs
            if count != -1:
                loop.epoch_loop.max_steps = trainer.global_step + count

    def _load(self, trainer: Any, pl_module: Any) -> Mapping[str, Any]:
        """Load the model at hand into the module, once; return its ``meta``."""
        session = self._session
        if session.task is None or ranks.world() > 1:
            session.agree()
        assert session.assignment is not None
        if self._loaded != session.assignment.number:
            received = session.receive()
            models.load(_model(trainer, pl_module), received.params if received is not None else {}, self._strict)
            self._loaded = session.assignment.number
        return session.assignment.meta


def _model(trainer: Any, pl_module: Any) -> Any:
    return pl_module if trainer.strategy.model is None else trainer.strategy.model


def _stateful(trainer: Any) -> list[Any]:
    return [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]


def _meta(pl_module: Any) -> dict[str, Any]:
    return dict(getattr(pl_module, FL_META_KEY, {}))
