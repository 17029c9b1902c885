# SPDX-License-Identifier: Apache-2.0
"""How many copies of the model a round holds at once, counted by tracemalloc with the benchmark's own federation."""

import asyncio
import importlib.util
import sys
import tracemalloc
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "memory.py"
MIB = 4  # the largest that is worked on in memory


def copies(strategy, sites, directory, monkeypatch):
    monkeypatch.chdir(directory)
    spec = importlib.util.spec_from_file_location("memory_benchmark", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "memory_benchmark", module)
    spec.loader.exec_module(module)
    tracemalloc.start()
    try:
        asyncio.run(module.federate(MIB, sites, 3, strategy))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak / (MIB << 20)


KRUM = {"name": "fedavg", "robust": {"rule": "multi-krum", "malicious": 0}}


@pytest.mark.parametrize(("strategy", "most"), [("fedavg", 4.3), ("fedavgm", 5.3), ("scaffold", 11.3), (KRUM, 3.3)])
def test_a_round_holds_few_copies_whatever_the_number_of_sites(strategy, most, tmp_path, monkeypatch):
    """FedAvg: the model, the trained one or the weighed update, the update, and the accumulator."""
    few, many = (copies(strategy, sites, tmp_path, monkeypatch) for sites in (3, 8))
    assert many <= most
    assert many <= 1.05 * few
