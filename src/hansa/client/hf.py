# SPDX-License-Identifier: Apache-2.0
"""A ``transformers`` trainer (or ``trl``'s ``SFTTrainer``) in a federation.

    import hansa.client.hf as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()                 # metrics of the model as received
        trainer.train()                    # from the received model; what it gives is sent

| case | result |
|---|---|
| ``train`` | loads the received model, trains ``num_train_epochs`` or ``max_steps``, sends it with the metrics of |
| | ``evaluate`` and the steps it made |
| ``evaluate`` outside ``train`` | loads the received model; its numbers, but for speeds, are the round's metrics |
| no ``evaluate`` before ``train`` | no metrics are sent |
| the round only evaluates | ``evaluate`` sends the metrics, and ``train`` does nothing |
| a ``peft`` model | only the adapter travels; ``model.factory`` gives ``get_peft_model_state_dict(model)`` |
| the optimiser | goes on from where the last round left it, or starts anew (``restore_state=False``); the schedule is |
| | always a round's; after a crash of the process both start anew |
| random numbers | ``args.seed`` and ``args.data_seed`` are ``meta["seed"]``, so every round has batches of its own |
| FedProx, SCAFFOLD | work (``recipe.steps = "prepared"``); SCAFFOLD with ``optim = "sgd"`` |
| a job under dp-sgd | PrivacyError that names ``prepare`` |
| several processes | DDP and FSDP under ``torchrun``: rank 0 talks, the others are sent what it received; |
| | ``evaluate`` before the first ``train`` does not keep the model from being wrapped |
| ``fsdp`` in the arguments, on a machine without a GPU | accelerate trains with DDP instead, and does not say so; |
| | ``from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))`` shards on CPUs, too |
| DeepSpeed | JobError: its state is not gathered |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from hansa.client import models, ranks
from hansa.client.private import refuse
from hansa.client.script import (
    AnalyticsDataType,
    FLModel,
    ParamsType,
    Session,
    clear,
    current,
    evaluate,
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
    train,
)
from hansa.client.steps import Stepping
from hansa.errors import JobError

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "clear",
    "evaluate",
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
    "train",
]

_SPEEDS = ("runtime", "per_second", "compilation_time", "preparation_time", "epoch", "num_tokens")


def patch(trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True) -> None:
    """Make ``trainer`` take part in the federation; a second call changes nothing. Calls ``init`` if need be.

    Args:
        trainer: a ``transformers.Trainer``, or one derived from it.
        restore_state: whether the optimiser goes on from round to round.
        load_state_dict_strict: whether the received model must have every tensor of a full model.

    Raises:
        JobError: the trainer runs under DeepSpeed.
    """
    init()
    if any(isinstance(callback, _Rounds) for callback in trainer.callback_handler.callbacks):
        return
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise JobError("patch() does not gather DeepSpeed's state. Use FSDP, DDP, or one process.")
    rounds = _Rounds(current(), trainer, restore_state, load_state_dict_strict)
    trainer.add_callback(rounds)
    trainer.train = rounds.train
    trainer.evaluate = rounds.evaluate


class _Rounds(TrainerCallback):  # type: ignore[misc]
    """What :func:`patch` puts between the script and its trainer."""

    def __init__(self, session: Session, trainer: Any, restore_state: bool, strict: bool) -> None:
        self._session = session
        self._trainer = trainer
        self._restore = restore_state
        self._strict = strict
        self._train, self._evaluate = trainer.train, trainer.evaluate
        self._training = self._wrapped = False
        self._loaded: int | None = None
        self._metrics: dict[str, float] = {}
        self._judged_turn: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train from the received model, and send what comes of it."""
        trainer, session = self._trainer, self._session
        if self._judged_turn is not None and self._judged_turn == session.turn:
            return None
        seed = int(self._task()["seed"])
        refuse(session, "a trainer fetches batches ahead, and divides a loss by what its whole batch holds")
        trainer.args.seed = trainer.args.data_seed = seed
        if not self._restore and trainer.optimizer is not None:
            trainer.optimizer.state.clear()
        self._training = True
        try:
            result = self._train(*args, **kwargs)
        finally:
            self._training = False
        state = models.gathered(trainer.model_wrapped)
        meta = {"NUM_STEPS_CURRENT_ROUND": max(1, trainer.state.global_step)}
        session.send(FLModel(ParamsType.FULL, state, metrics=self._metrics, meta=meta))
        self._metrics, self._loaded = {}, None
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Judge the received model; inside ``train``, what the trainer judges by itself."""
        if self._training:
            return self._evaluate(*args, **kwargs)
        self._task()
        self._load()
        metrics = self._evaluate(*args, **kwargs)
        if not self._wrapped:  # accelerate takes it for ready now: train() would not wrap it, nor share gradients
            vars(self._trainer.model).pop("_is_accelerate_prepared", None)
        self._metrics = {n: float(v) for n, v in metrics.items() if not n.endswith(_SPEEDS) and _is_number(v)}
        if self._session.task == "evaluate":
            self._session.send(FLModel(metrics=self._metrics))
            self._judged_turn = self._session.turn
            self._loaded = None
        return metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the received model into what the trainer has wrapped, and see the optimiser's steps."""
        self._wrapped = True
        self._load()
        Stepping(self._session, self._trainer.model_wrapped, self._trainer.optimizer)

    def _task(self) -> Mapping[str, Any]:
        session = self._session
        if session.task is None or ranks.world() > 1:
            session.agree()
        assert session.assignment is not None
        return session.assignment.meta

    def _load(self) -> None:
        session = self._session
        assert session.assignment is not None
        if self._loaded != session.assignment.number:
            received = session.receive()
            params = received.params if received is not None else {}
            models.load(self._trainer.model_wrapped, params, self._strict)
            self._loaded = session.assignment.number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0
