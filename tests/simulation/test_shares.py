# SPDX-License-Identifier: Apache-2.0
"""Shares of a machine: what fits beside what, and which GPUs a worker sees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.config import EngineSection
from hansa.errors import JobError
from hansa.simulation.shares import Machine, Share, visible_gpus


def machine(cpus=4, gpus=("0", "1"), threads=1, **sites):
    return Machine(EngineSection.model_validate({"threads": threads, "sites": sites}), cpus, list(gpus))


def test_default_and_own_shares():
    m = machine(threads=2, big={"cpus": 9}, gpu={"gpus": 0.5})
    assert m.share("other") == Share(2, 0.0)
    assert m.share(None) == Share(2, 0.0)
    assert m.share("big") == Share(4, 0.0)
    assert m.share("gpu") == Share(2, 0.5)
    assert m.room() == 2


def test_without_gpu_shares_workers_see_what_this_process_sees():
    m = machine()
    assert m.devices(m.share("a")) is None
    assert m.fits(m.share("a"), None)


def test_gpus_fill_up_and_are_spread():
    m = machine(a={"gpus": 0.5}, b={"gpus": 1}, c={"gpus": 2})
    half, one, both, none = m.share("a"), m.share("b"), m.share("c"), m.share("d")
    assert m.devices(none) == ()
    assert m.devices(half) == ("0",)
    assert m.devices(half, [("0",)]) == ("1",)
    m.take(half, ("0",))
    assert m.devices(one) == ("1",)
    assert m.fits(half, ("0",))
    assert not m.fits(one, ("0",))
    assert not m.fits(both, ("0", "1"))
    assert not m.fits(none, ("0",)), "a site without a share sees no GPU"
    m.take(half, ("0",))
    assert not m.fits(half, ("0",))
    m.give(half, ("0",))
    m.give(half, ("0",))
    assert m.fits(both, ("0", "1"))


def test_too_many_gpus_are_refused():
    with pytest.raises(JobError, match=r"engine.sites.a.gpus is 3, and this machine shows 2 GPUs"):
        machine(a={"gpus": 3}).share("a")
    with pytest.raises(JobError, match="whole number"):
        machine(a={"gpus": 1.5}).share("a")


def test_visible_gpus(tmp_path):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert visible_gpus({}, tmp_path / "none") == []
    (tmp_path / "0000:01").mkdir()
    assert visible_gpus({}, tmp_path) == ["0"]


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.booleans()), max_size=40))
def test_the_sum_of_running_shares_stays_within_the_machine(wishes):
    m = machine(cpus=4, gpus=("0", "1"), some={"gpus": 1.0})
    running = []
    for cpus, gpus, leaves in wishes:
        share = Share(min(cpus, 4), gpus)
        devices = m.devices(share)
        if m.fits(share, devices):
            m.take(share, devices)
            running.append((share, devices))
        if leaves and running:
            m.give(*running.pop(0))
        assert sum(share.cpus for share, _ in running) <= 4
        for gpu in ("0", "1"):
            assert sum(min(1.0, share.gpus) for share, seen in running if gpu in seen) <= 1.0 + 1e-9
