# SPDX-License-Identifier: Apache-2.0
"""What runs at a site; and, for training scripts of one's own, the client API: ``import hansa.client as flare``."""

from __future__ import annotations

from typing import Any

from hansa.client.script import (
    AnalyticsDataType,
    FLModel,
    ParamsType,
    clear,
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
    "prepare",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]


def prepare(model: Any, optimizer: Any, loader: Any = None) -> tuple[Any, ...]:
    """Let the federation see, and correct, each step of ``optimizer``; see :mod:`hansa.client.steps`."""
    from hansa.client import steps

    return steps.prepare(model, optimizer, loader)


def patch(trainer: Any, **options: Any) -> None:
    """Make a Lightning or ``transformers`` (``trl``) trainer take part in the federation.

    It is :func:`hansa.client.lightning.patch` or :func:`hansa.client.hf.patch`, by the trainer's class.

    Raises:
        JobError: it is neither.
    """
    from hansa.errors import JobError

    families = {cls.__module__.partition(".")[0] for cls in type(trainer).__mro__}
    if families & {"lightning", "pytorch_lightning"}:
        from hansa.client import lightning

        lightning.patch(trainer, **options)
    elif "transformers" in families:
        from hansa.client import hf

        hf.patch(trainer, **options)
    else:
        raise JobError(
            f"patch() takes a Lightning Trainer or a transformers Trainer, not a {type(trainer).__name__}. "
            "For a loop of your own, use prepare(model, optimizer, loader)."
        )
