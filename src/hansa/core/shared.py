# SPDX-License-Identifier: Apache-2.0
"""Blocks of a large model worked on by two processors at once: for what the whole federation waits for.

| case | result |
|---|---|
| a small model, or one processor | a plain loop |
| work that raises | raised once every thread is done with what it was at; nothing more is begun |
| the threads are at other work | whoever asked does all of it |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from threading import Lock
from typing import TypeVar

from hansa.core import tree as trees

THREADS = 2
"""At most so many, whatever the number of processors: each holds a few blocks, for FedAdam 20 MiB."""

_T = TypeVar("_T")


def shared(num_bytes: int, work: Callable[[_T], object], items: Iterable[_T]) -> None:
    """Do ``work`` for every item, in no order, in this thread and some others; all is done when this returns.

    Args:
        num_bytes: how much is moved in all. A little is moved by this thread alone, in order.
        work: what is done; NumPy, hashing and files let other threads go on.
        items: for what.
    """
    left, lock = iter(items), Lock()
    stopped = False

    def run() -> None:
        nonlocal stopped
        while True:
            with lock:
                taken = [] if stopped else list(islice(left, 1))
            if not taken:
                return
            try:
                work(taken[0])
            except BaseException:  # the others end, too; raised again
                stopped = True
                raise

    count = _count() if num_bytes > trees.LARGE else 1
    others = [_threads().submit(run) for _ in range(count - 1)]
    try:
        run()
    finally:
        wait([other for other in others if not other.cancel()])
    for other in others:
        if not other.cancelled():
            other.result()


def _count() -> int:
    return min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS - 1, "blocks")
