# SPDX-License-Identifier: Apache-2.0
"""Engine ``processes``: the same bits as ``local``, and every way in which a worker or a site can fail."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import mischief
import tiny
import toys
from hansa import registry
from hansa.core.config import parse
from hansa.core.ports import topic
from hansa.core.values import Absence, Model, Plan, Snapshot
from hansa.errors import DataError, HansaError, JobError, QuorumError, SiteError
from hansa.runs.engine import inspect_all
from hansa.simulation.engines import open_engine
from hansa.simulation.pool import PATIENCE
from hansa.simulation.processes import Processes
from hansa.simulation.run import run
from hansa.strategies.fedavg import fedavg
from hansa.workers.runner import Course

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """No test may leave a process behind."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    until = time.monotonic() + 5
    while left := [c for c in psutil.Process().children(recursive=True) if c.pid not in before and alive(c.pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def rounds(job, engine, course=None):
    """Run ``job``'s workflow over an entered engine and return its records."""
    course = course or Course(job.name, tuple(engine.sites), job.strategy, tuple(job.filters))
    strategy, _ = course.pieces()
    model = Model.start(await engine.initial())
    start = Snapshot(0, model, strategy.init(model))
    workflow = registry.build("workflows", job.workflow.name, job.workflow.options)
    return [record async for record in workflow.rounds(job, strategy, engine.cohort(course), engine.peers, start, None)]


async def carried_out(job, directory):
    directory.mkdir(exist_ok=True)
    async with open_engine(job, directory) as engine:
        return await rounds(job, engine)


def bits(record):
    """Return everything of a record that must not depend on the engine."""
    arrays = {f"model.{name}": leaf.tobytes() for name, leaf in record.model.params.items()}
    arrays |= {f"{part}.{name}": leaf.tobytes() for part, tree in record.state.items() for name, leaf in tree.items()}
    return arrays, record.accepted, record.metrics, record.acknowledged


def absences(record):
    return {absence.site: (absence.kind, absence.reason) for absence in record.absent}


def a_plan(number=1, **values):
    return Plan("mischief", number, "train", number - 1, {"w": np.zeros(8, np.float32)}, seed=0, **values)


async def answers(cohort, plan, sites):
    return {
        reply.site if isinstance(reply, Absence) else reply.header.site: reply
        async for reply in cohort.ask(plan, sites)
    }


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": "fedavg", "filters": [{"name": "clip", "max_norm": 0.5}]},
        {"strategy": "scaffold"},
        {"strategy": {"name": "fedadam", "lr": 0.1}, "cohort": {"sample": 2}},
    ],
    ids=lambda sections: str(sections["strategy"]),
)
async def test_the_same_bits_as_local(tmp_path, sections):
    local = await carried_out(toys.job(engine={"name": "local"}, **sections), tmp_path / "local")
    there = await carried_out(toys.job(engine={"name": "processes", "workers": 2}, **sections), tmp_path / "there")
    assert [bits(record) for record in there] == [bits(record) for record in local]


async def test_cyclic_through_peers_gives_the_same_bits(tmp_path):
    sections = {"workflow": "cyclic", "recipe": {"faults": {"s1:2": "raise"}}, "rounds": 3}
    local = await carried_out(toys.job(**sections), tmp_path / "local")
    job = toys.job(engine={"name": "processes", "workers": 2}, **sections)
    there = await carried_out(job, tmp_path / "there")
    assert [bits(record) for record in there] == [bits(record) for record in local]
    assert "on fire" in absences(there[1])["s1"][1]


async def test_two_workflows_at_once(tmp_path):
    job = mischief.job(rounds=3, engine_options={"workers": 2})
    async with open_engine(job, tmp_path) as engine:
        alone = await rounds(job, engine, course=Course("alone", engine.sites, job.strategy))
        courses = [Course(f"course-{site}", (site,), job.strategy) for site in engine.sites]
        together = await asyncio.gather(
            rounds(job, engine, course=Course("all", engine.sites, job.strategy)),
            *(rounds(job, engine, course=course) for course in courses),
        )
    assert bits(together[0][-1])[0] == bits(alone[-1])[0]
    assert [record.accepted for record in together[1]] == [("a",)] * 3
    assert not list((tmp_path / "exchange").glob("*"))


@pytest.mark.parametrize(
    ("deed", "kind", "words"),
    [
        ("kill", "lost", "SIGKILL"),
        ("exit", "lost", "exited with code 7"),
        ("segfault", "lost", "SIGSEGV"),
        ("raise", "lost", "ValueError: the site's disk is on fire"),
    ],
)
async def test_a_worker_that_dies_costs_its_site_one_round(tmp_path, deed, kind, words):
    job = mischief.job(recipe={"deeds": {"b:2": deed}, "diary": str(tmp_path / "diary")})
    records = await carried_out(job, tmp_path)
    assert [record.accepted for record in records] == [("a", "b", "c"), ("a", "c"), ("a", "b", "c")]
    got_kind, reason = absences(records[1])["b"]
    assert got_kind == kind
    assert words in reason
    if deed == "segfault":
        assert "Segmentation fault" in (tmp_path / "sites.log").read_text()


async def test_a_worker_killed_from_outside_while_idle_is_replaced(tmp_path):
    job = mischief.job(engine_options={"workers": 1})
    async with open_engine(job, tmp_path) as engine:
        (worker,) = engine.pool.workers
        os.kill(worker.process.pid, signal.SIGKILL)
        records = await rounds(job, engine)
        await engine.export({"w": np.ones(2, np.float32)}, tmp_path)
        assert await engine.show({"w": np.ones(2, np.float32)}) == {"w": "1.0"}
    assert len(records[-1].accepted) >= 2
    assert (tmp_path / "exported").read_bytes() == np.ones(2, np.float32).tobytes()


async def test_a_site_that_exits_is_lost_in_both_engines(tmp_path):
    for name in ("local", "processes"):
        job = toys.job(engine={"name": name}, rounds=2, recipe={"faults": {"s1:1": "exit"}})
        records = await carried_out(job, tmp_path / name)
        assert absences(records[0])["s1"][0] == "lost"
        assert "SystemExit: 3" in absences(records[0])["s1"][1]
        assert records[1].accepted == ("s0", "s1", "s2")


async def test_below_quorum_every_site_is_named(tmp_path):
    job = mischief.job(recipe={"deeds": {"a:1": "raise", "c:1": "kill"}}, cohort={"quorum": 1.0})
    with pytest.raises(QuorumError) as caught:
        await carried_out(job, tmp_path)
    assert "a: lost: ValueError: the site's disk is on fire" in caught.value.message
    assert "c: lost: its worker was ended by SIGKILL" in caught.value.message
    assert "b:" not in caught.value.message


async def test_deadline_and_late_updates(tmp_path):
    job = mischief.job(recipe={"sleep": {"b:1": 2.5}}, engine_options={"workers": 2}, cohort={"late": "accept"})
    async with Processes(job, tmp_path, cpus=2) as engine:
        while not all(worker.ready for worker in engine.pool.workers):
            await asyncio.sleep(0.02)
        cohort = engine.cohort(Course("mischief", engine.sites, job.strategy))
        begun = time.monotonic()
        first = await answers(cohort, a_plan(1, deadline_s=1.0), ["b", "c"])
        assert time.monotonic() - begun < 2.4
        assert (first["b"].kind, first["b"].reason) == ("late", "not done after the deadline of 1 s")
        assert first["c"].header.round == 1
        again = await answers(cohort, a_plan(2), ["b", "c"])
        assert (again["b"].kind, again["b"].reason) == ("late", "still working on round 1")
        assert not cohort.late(2)
        while not (late := cohort.late(2)):
            await asyncio.sleep(0.02)
        (handle,) = late
        assert (handle.header.site, handle.header.round) == ("b", 1)
        assert handle.header.seconds > 2.5
        assert [chunk.tensor for chunk in handle.chunks()] == ["w"]
        handle.release()
        assert not cohort.late(2)
        assert (await answers(cohort, a_plan(3, deadline_s=5.0), ["b"]))["b"].header.round == 3


@pytest.mark.parametrize("late", ["accept", "discard"])
async def test_a_late_update_joins_a_later_round_or_is_named(tmp_path, late):
    cohort = {"deadline_s": 0.5, "late": late, "sample": 2.0, "quorum": 1.0e-9}
    job = mischief.job(rounds=8, recipe={"sleep": {"a": 0.8, "b": 0.3, "c": 0.3}}, cohort=cohort)
    async with Processes(job, tmp_path, cpus=3) as engine:
        records = await rounds(job, engine)
    kinds = {absence.reason for record in records for absence in record.absent if absence.kind == "late"}
    assert any("not done after the deadline" in reason for reason in kinds)
    stale = [record for record in records if "a" in record.accepted and "a" not in record.asked]
    assert bool(stale) == (late == "accept")
    if late == "discard":
        assert not any("a" in record.accepted for record in records)


@pytest.mark.parametrize("late", ["accept", "discard"])
async def test_a_hung_site_gives_way_when_others_wait(tmp_path, late):
    cohort = {"deadline_s": 0.5, "late": late}
    job = mischief.job(recipe={"sleep": {"a:1": 600}}, engine_options={"workers": 1}, cohort=cohort)
    begun = time.monotonic()
    records = await carried_out(job, tmp_path)
    assert absences(records[0])["a"][0] == "late"
    assert [record.accepted for record in records] == [("b", "c"), ("a", "b", "c"), ("a", "b", "c")]
    assert time.monotonic() - begun > (0.5 + PATIENCE * 0.5 if late == "accept" else 0.5)


async def test_workers_stay_warm_and_sites_return_to_them(tmp_path):
    sites = [f"s{i}" for i in range(6)]
    recipe = {"sites": sites, "diary": str(tmp_path / "diary"), "sleep": dict.fromkeys(sites, 0.02), "sticky": True}
    job = mischief.job(rounds=4, recipe=recipe)
    async with Processes(job, tmp_path, cpus=2) as engine:
        await rounds(job, engine)
    lines = mischief.diary(tmp_path / "diary")
    homes = {site: {line[0] for line in lines if line[1] == site} for site in sites}
    assert all(len(pids) == 1 for pids in homes.values())
    assert len(set.union(*homes.values())) == 2
    assert (tmp_path / "diary.closed").exists()


async def test_running_shares_never_exceed_the_machine(tmp_path):
    sites = ["a", "b", "c", "wide"]
    options = {"threads": 1, "workers": 4, "sites": {"wide": {"cpus": 3}}}
    recipe = {"sites": sites, "diary": str(tmp_path / "diary"), "sleep": dict.fromkeys(sites, 0.1)}
    job = mischief.job(rounds=3, recipe=recipe, engine_options=options)
    async with Processes(job, tmp_path, cpus=3) as engine:
        await rounds(job, engine)
    lines = mischief.diary(tmp_path / "diary")
    assert len(lines) == 12
    cpus = {"wide": 3}
    for _, _, _, begin, _, _ in lines:
        running = [site for _, site, _, b, e, _ in lines if b <= begin < e]
        assert sum(cpus.get(site, 1) for site in running) <= 3


async def test_gpus_are_assigned_before_frameworks_start(tmp_path):
    sites = ["cpu", "half1", "half2", "both"]
    shares = {"half1": {"gpus": 0.5}, "half2": {"gpus": 0.5}, "both": {"gpus": 2}}
    recipe = {"sites": sites, "diary": str(tmp_path / "diary")}
    job = mischief.job(rounds=2, recipe=recipe, engine_options={"sites": shares})
    async with Processes(job, tmp_path, cpus=2, gpus=["GPU-x", "GPU-y"]) as engine:
        records = await rounds(job, engine)
    assert [record.accepted for record in records] == [tuple(sorted(sites))] * 2
    seen = {site: {line[5] for line in mischief.diary(tmp_path / "diary") if line[1] == site} for site in sites}
    assert seen["cpu"] == {""}
    assert seen["both"] == {"GPU-x,GPU-y"}
    assert seen["half1"] | seen["half2"] <= {"GPU-x", "GPU-y"}


@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [
        ("data", DataError, "There is no file 'x.jsonl'."),
        ("kill", SiteError, "SIGKILL"),
        ("defect", RuntimeError, "ZeroDivisionError: a defect"),
    ],
)
async def test_a_program_that_does_not_start(tmp_path, start, kind, words):
    with pytest.raises(kind, match=words):
        async with open_engine(mischief.job(recipe={"start": start}), tmp_path):
            pass


async def test_replacements_that_do_not_start_end_the_waiting(tmp_path):
    recipe = {"start": "once", "starts": 1, "diary": str(tmp_path / "diary"), "deeds": {"a:1": "kill"}}
    job = mischief.job(recipe=recipe, engine_options={"workers": 1}, cohort={"quorum": 1.0})
    with pytest.raises(QuorumError) as caught:
        await carried_out(job, tmp_path)
    assert "b: lost: no worker can be started any more: its worker exited with code 9" in caught.value.message


async def test_inspection_names_sites(tmp_path):
    async with open_engine(mischief.job(recipe={"deeds": {"b": "empty"}}), tmp_path) as engine:
        reports, errors = await inspect_all(engine)
    assert [report.site for report in reports] == ["a", "c"]
    assert isinstance(errors["b"], DataError)
    assert errors["b"].site == "b"


async def test_metrics_that_are_no_numbers_arrive_as_such(tmp_path):
    async with open_engine(mischief.job(), tmp_path) as engine:
        assert np.isnan((await engine.summarise({"loss_sum": 0.0, "examples": 0.0}))["loss"])
        with pytest.raises(RuntimeError, match="KeyError"):
            await engine.summarise({})


async def test_what_processes_can_not_do_is_said(tmp_path):
    job = mischief.job()
    with pytest.raises(JobError, match="takes no finished one"):
        open_engine(job, tmp_path, mischief.Mischief())
    engine = Processes(job, tmp_path)
    with pytest.raises(JobError, match="can't send 'fedavg'"):
        engine.cohort(Course("x", ("a",), fedavg()))
    with pytest.raises(JobError, match="the job's sites are: a, b, c"):
        async with open_engine(mischief.job(engine_options={"sites": {"d": {"cpus": 1}}}), tmp_path):
            pass


async def test_a_workflow_that_stops_early_leaves_nothing(tmp_path):
    job = mischief.job(recipe={"sleep": {"a": 0.2, "b": 0.2, "c": 0.2}}, engine_options={"workers": 1})
    async with open_engine(job, tmp_path) as engine:
        cohort = engine.cohort(Course("mischief", engine.sites, job.strategy))
        replies = cohort.ask(a_plan(), engine.sites)
        (await anext(replies)).release()
        await replies.aclose()
        assert len(await answers(cohort, a_plan(2), ["b", "c"])) == 2
        await asyncio.sleep(0.5)
        for reply in (await answers(cohort, a_plan(3), engine.sites)).values():
            reply.release()
    assert not (tmp_path / "exchange").exists()


PARENT = """
import asyncio, sys, pathlib, mischief
from hansa import registry
from hansa.core.values import Model, Snapshot
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather
from hansa.simulation.engines import open_engine

async def main():
    job = mischief.job(rounds=1000, recipe={"sleep": {"a": 0.05}, "diary": sys.argv[1] + "/diary"},
                       engine_options={"workers": 2})
    async with open_engine(job, pathlib.Path(sys.argv[1])) as engine:
        print(*[worker.process.pid for worker in engine.pool.workers], flush=True)
        assert "torch" not in sys.modules
        course = Course("mischief", tuple(engine.sites), job.strategy)
        strategy, _ = course.pieces()
        model = Model.start(await engine.initial())
        start = Snapshot(0, model, strategy.init(model))
        workflow = registry.build("workflows", "scatter-gather", {})
        async for _ in workflow.rounds(job, strategy, engine.cohort(course), engine.peers, start, None):
            pass

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_the_engine(tmp_path, how):
    env = {**os.environ, "PYTHONPATH": str(Path(mischief.__file__).parent)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert pids, parent.communicate()[1]
    while not (tmp_path / "diary").exists():
        assert parent.poll() is None, parent.communicate()[1]
        time.sleep(0.02)
    parent.send_signal(how)
    output, error = parent.communicate(timeout=30)
    assert output == ""
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in error
        assert not (tmp_path / "exchange").exists()
    until = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


async def test_what_workers_print_goes_to_the_log(tmp_path, capfd):
    job = mischief.job(rounds=1, recipe={"deeds": {"a:1": "segfault"}})
    await carried_out(job, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert "Segmentation fault" in (tmp_path / "sites.log").read_text()


async def test_a_thousand_empty_sites_take_no_time(tmp_path):
    sites = [f"s{i:04d}" for i in range(1000)]
    job = mischief.job(rounds=2, recipe={"sites": sites, "size": 4})
    records = await carried_out(job, tmp_path)
    assert len(records[-1].accepted) == 1000
    assert records[-1].seconds < 10  # about half a second on two idle cores; this is no benchmark


def test_errors_keep_their_kind_and_context():
    from hansa.workers.messages import failed

    error = failed(3, DataError("no rows", site="a", round=2)).as_error()
    assert isinstance(error, DataError)
    assert str(error) == "site a, round 2: no rows"

    class OwnError(HansaError):
        pass

    assert type(failed(1, OwnError("x")).as_error()) is HansaError
    assert topic("j", "a") == "j.a"


@pytest.mark.timeout(240)  # starts torch in several processes
def test_fine_tuning_gives_the_same_bits_as_local(tmp_path):
    texts = [{"text": f"the {animal} sat on the {thing}. " * 3} for animal in ("cat", "dog", "ox") for thing in "abc"]
    data = {site: tiny.rows(tmp_path / f"{site}.jsonl", texts[i::2]) for i, site in enumerate(("berlin", "kiel"))}
    digests = []
    for engine in ("local", "processes"):
        job = parse(
            {
                "name": "tiny",
                "rounds": 2,
                "recipe": {"name": "causal-lm", "max_length": 32},
                "model": {**tiny.LLAMA, "adapter": {"method": "lora", "r": 4}},
                "data": {"train": data},
                "train": {"steps": 2, "lr": 0.01, "batch_size": 2},
                "engine": {"name": engine, "threads": 1, "workers": 2},
                "baselines": {"base": False, "local": False},
                "output": {"dir": str(tmp_path / engine)},
            }
        )
        done = run(job)
        files = sorted(done.directory.glob("**/*.safetensors"))
        assert files
        digests.append({str(f.relative_to(done.directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
        assert [record["accepted"] for record in done.records] == [["berlin", "kiel"]] * 2
    assert digests[0] == digests[1]
    assert any(name.startswith("model/") for name in digests[0])
