# SPDX-License-Identifier: Apache-2.0
"""A chain of filters: applied in order, each with its own memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hansa.core.filter import Filter, run
from hansa.core.values import Update


def update(value: float = 1.0) -> Update:
    return Update("berlin", 1, 0, {"delta": {"w": np.array([value])}}, 1.0, {})


def plus(name: str, amount: float, remembers: bool = False) -> Filter:
    """w -> 10 w + amount + what it remembers; remembers how often it ran."""

    def apply(item: Update, weighed: Mapping[str, bool], memory: Any) -> tuple[Update, Any]:
        assert weighed == {"delta": True}
        times = memory["seen"]["times"][0] if memory else 0.0
        changed = {"delta": {"w": item.parts["delta"]["w"] * 10 + amount + times}}
        return replace(item, parts=changed), {"seen": {"times": np.array([times + amount])}} if remembers else {}

    return Filter(name, frozenset(), apply)


def value(item: Update) -> float:
    return float(item.parts["delta"]["w"][0])


def test_no_filter_changes_nothing() -> None:
    item = update()
    assert run([], item, {"delta": True}, {}) == (item, {})


def test_filters_run_in_order() -> None:
    got, memory = run([plus("a", 2), plus("b", 3)], update(), {"delta": True}, {})
    assert value(got) == 123
    assert memory == {}, "what remembers nothing takes no room"


def test_memory_goes_back_to_the_filter_that_left_it() -> None:
    chain = [plus("a", 1, remembers=True), plus("b", 2), plus("c", 3, remembers=True)]
    first, memory = run(chain, update(), {"delta": True}, {})
    assert value(first) == 1123
    second, _ = run(chain, update(), {"delta": True}, memory)
    assert value(second) == 1123 + 1 * 100 + 3


def test_two_filters_of_one_name_do_not_share_their_memory() -> None:
    chain = [plus("same", 1, remembers=True), plus("same", 4, remembers=True)]
    _, memory = run(chain, update(), {"delta": True}, {})
    assert len(memory) == 2
    got, _ = run(chain, update(), {"delta": True}, memory)
    assert value(got) == 114 + 1 * 10 + 4
