# SPDX-License-Identifier: Apache-2.0
"""The server's log: one line an event on standard error, for people or as JSON.

Everything goes through it: structlog's loggers and the standard library's (gRPC, uvicorn, Alembic). What a stranger
wrote can't forge a line or move the terminal's cursor: control characters are shown escaped. (For people, a
traceback is printed below its line.)
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import AbstractContextManager
from typing import Literal

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_QUIET = ("alembic", "asyncio", "grpc", "uvicorn")
"""Libraries that are heard from warnings on."""


def set_up(log_format: Literal["console", "json"], level: int = logging.INFO) -> None:
    """Send this process's log to standard error."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    last: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _escaped]
    if log_format == "json":
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        plain = structlog.dev.plain_traceback
        last.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def bound(**values: object) -> AbstractContextManager[object]:
    """Add ``values`` (job, site, round) to every line that this task or thread logs inside the ``with`` block."""
    return structlog.contextvars.bound_contextvars(**values)


def _escaped(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {name: _one_line(value) if isinstance(value, str) else value for name, value in event.items()}


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] != "\n" else "\\n", text)
