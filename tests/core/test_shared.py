# SPDX-License-Identifier: Apache-2.0
"""Work that several processors share is all done once, whatever the threads are at."""

import threading

import pytest

from hansa.core import shared as sharing
from hansa.core import tree as trees
from hansa.core.shared import shared


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(sharing, "_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize("num_bytes", [0, trees.LARGE + 1])
def test_every_item_is_worked_on_once(threads, num_bytes):
    done = []
    shared(num_bytes, done.append, range(1000))
    assert sorted(done) == list(range(1000))
    shared(num_bytes, done.append, [])
    assert len(done) == 1000


def test_a_large_piece_of_work_is_shared_and_a_small_one_is_not(monkeypatch):
    monkeypatch.setattr(sharing, "_count", lambda: 2)
    at_once = threading.Barrier(2)
    shared(trees.LARGE + 1, lambda _: at_once.wait(30), range(2))
    names = set()
    shared(trees.LARGE, lambda _: names.add(threading.current_thread().name), range(100))
    assert names == {threading.current_thread().name}


def test_an_error_ends_the_work_and_is_raised(threads):
    done = []

    def work(item):
        if item == 10:
            raise OSError("the disk is full")
        done.append(item)

    with pytest.raises(OSError, match="full"):
        shared(trees.LARGE + 1, work, range(1_000_000))
    assert len(done) < 1_000_000


def test_threads_that_are_busy_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(sharing, "_count", lambda: sharing.THREADS)
    busy, free = threading.Semaphore(0), threading.Event()

    def hold(_):
        busy.release()
        assert free.wait(60)

    holding = threading.Thread(target=shared, args=(trees.LARGE + 1, hold, range(sharing.THREADS)))
    holding.start()
    for _ in range(sharing.THREADS):
        assert busy.acquire(timeout=60)
    done = []
    shared(trees.LARGE + 1, done.append, range(100))
    assert done == list(range(100))
    free.set()
    holding.join()
