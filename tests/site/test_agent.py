# SPDX-License-Identifier: Apache-2.0
"""The agent against a real server: what it does when anything around it fails, lies, or goes away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import toys
from federations import Loopback, loopback
from hansa.bundle import pack
from hansa.core import storage, wire
from hansa.core.config import Job
from hansa.core.values import Plan
from hansa.errors import AccessError, HansaError, JobError, StorageError
from hansa.pki.identity import Role
from hansa.pki.kit import Kit
from hansa.server.remote import Remote
from hansa.server.service import Service
from hansa.site import agent as agents
from hansa.site import joined
from hansa.site.outbox import Outbox, Outcome
from hansa.transport.messages import AbortJob, Agenda, Answer, AskAgenda, Assignment, DeleteJob, Poll, Ring
from hansa.transport.pieces import describe
from relay import relay
from shell import environment

pytestmark = pytest.mark.timeout(120)

LARGE = 400_000
"""Elements of a model whose update travels in pieces."""


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    until = time.monotonic() + 5
    while left := [child for child in workers() if child.pid not in before]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    """Return the processes that live below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def workers_of(folder: Path) -> list[psutil.Process]:
    """Return the workers whose output goes to a site's folder."""
    return [child for child in workers() if any(str(folder) in file.path for file in child.open_files())]


def job(folder: Path, sites=("s0",), rounds=3, **values) -> Job:
    recipe = {"sites": list(sites), "trained": str(folder / "trained.txt"), **values.pop("recipe", {})}
    sections = {"rounds": rounds, "evaluation": {"every": 0}, "directory": str(folder), **values}
    return toys.job(recipe=recipe, **sections)


def trained(folder: Path) -> Counter[str]:
    return Counter((folder / "trained.txt").read_text().splitlines())


def fails(monkeypatch, name: str, error: Callable[[], Exception], times: int, where=lambda *args: True) -> list[object]:
    """Let a method of the server raise the first ``times`` times, and return what it was called with."""
    seen: list[object] = []
    real = getattr(Service, name)

    def method(self, *args):
        if where(*args):
            seen.append(args)
            if len(seen) <= times:
                raise error()
        return real(self, *args)

    monkeypatch.setattr(Service, name, method)
    return seen


async def test_a_job_runs_and_leaves_nothing(tmp_path):
    async with loopback(tmp_path, ("s0", "s1")) as lab:
        for site in ("s0", "s1"):
            await lab.start(site)
        view = await lab.run(job(tmp_path, ("s0", "s1"), baselines={"base": True, "local": True}))
        assert view.line.state == "finished", view.line.error
        assert view.sites == {"s0": "ready", "s1": "ready"}
        assert trained(tmp_path) == Counter({f"{s} {r}": 2 for s in ("s0", "s1") for r in (1, 2, 3)})
        folder = lab.site("s0") / "work" / "jobs"
        async with asyncio.timeout(20):
            while list(folder.iterdir()) or workers_of(lab.site("s0")):
                await asyncio.sleep(0.05)


async def test_only_the_agent_speaks_the_network(tmp_path, monkeypatch):
    """The worker has no network socket, none of the kit's files, and no secret of the agent's environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "")
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        lab.write("s0", "resources = { environment = { OURS = '1' } }")
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=20, recipe={"delay_s": 0.05}))
        await lead.until(id, "round 1:")
        (worker,) = workers_of(lab.site("s0"))
        assert worker.net_connections("inet") == []
        assert psutil.Process().net_connections("inet")
        sockets = [fd for fd in Path(f"/proc/{worker.pid}/fd").iterdir() if str(fd.readlink()).startswith("socket:")]
        assert len(sockets) == 1
        variables = worker.environ()
        assert "AWS_SECRET_ACCESS_KEY" not in variables
        assert "HTTPS_PROXY" not in variables
        assert (variables["OURS"], variables["HF_HUB_OFFLINE"]) == ("1", "1")
        kit = {str(path) for path in lab.site("s0").iterdir() if path.is_file()}
        assert not kit & {file.path for file in worker.open_files()}
        await lab.stop("s0")


async def test_a_refusal_reaches_the_submitter(tmp_path):
    async with loopback(tmp_path, ("s0", "s1")) as lab:
        lab.write("s1", max_rounds=2)
        for site in ("s0", "s1"):
            await lab.start(site)
        view = await lab.run(job(tmp_path, ("s0", "s1")))
        assert view.sites["s1"] == "refused: The job has 3 rounds; this site allows 2."
        assert view.sites["s0"] == "ready"


async def test_a_revoked_certificate_ends_the_agent(tmp_path):
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        lab.authority.revoke(f"{Kit(lab.site('s0')).identity.serial:x}", "lost laptop")
        Kit(lab.made.server).update_roster(lab.authority.roster.data)
        with pytest.raises(AccessError, match=r"revoked.*lost laptop"):
            async with asyncio.timeout(20):
                await lab.agents.pop("s0")


async def test_a_revoked_certificate_ends_the_command_with_code_10(tmp_path):
    async with loopback(tmp_path) as lab:
        lab.authority.revoke(f"{Kit(lab.site('s0')).identity.serial:x}", "lost laptop")
        Kit(lab.made.server).update_roster(lab.authority.roster.data)
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from hansa.cli.main import main; main()", "site", "start", str(lab.site("s0"))),
            env=environment(),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(command.communicate(), 60)
        assert command.returncode == AccessError.exit_code, said.decode()
        assert "revoked" in said.decode()


async def test_a_renewed_certificate_is_used_without_a_restart(tmp_path):
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=12, recipe={"delay_s": 0.02}))
        await lead.until(id, "round 1:")
        kit = Kit(lab.site("s0"))
        before = kit.identity.serial
        reply = lab.authority.reply(lab.authority.renew(kit.renewal()))
        Kit(lab.made.server).update_roster(lab.authority.roster.data)
        Kit.install(lab.site("s0"), reply)
        lab.authority.revoke(f"{before:x}", "renewed")
        Kit(lab.made.server).update_roster(lab.authority.roster.data)
        waiting = asyncio.create_task(lead.wait(id))
        await asyncio.wait({waiting, lab.agents["s0"]}, return_when=asyncio.FIRST_COMPLETED)
        assert not lab.agents["s0"].done(), lab.agents["s0"].exception()
        assert (await waiting).line.state == "finished"


async def test_a_new_roster_comes_from_the_server(tmp_path):
    async with loopback(tmp_path, lease_s=1) as lab:
        await lab.start("s0")
        lab.authority.issue(tmp_path / "late", Role.OBSERVER, "bo")
        Kit(lab.made.server).update_roster(lab.authority.roster.data)
        async with asyncio.timeout(20):
            while Kit(lab.site("s0")).roster().version != lab.authority.roster.version:
                await asyncio.sleep(0.05)


async def test_a_job_whose_signer_is_revoked_is_refused_from_then_on(tmp_path):
    async with loopback(tmp_path, lease_s=2) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=200, recipe={"delay_s": 0.02}))
        await lead.until(id, "round 1:")
        lab.authority.revoke(f"{Kit(lab.made.users['ana']).identity.serial:x}", "left")
        Kit(lab.site("s0")).update_roster(lab.authority.roster.data)
        seen = [event.text async for event in lead.events(id)]
        assert any("bundle was not accepted" in text and "revoked" in text for text in seen), seen[-3:]


@pytest.mark.parametrize("size", [4, LARGE])
async def test_a_server_that_fails_while_answers_come_in(tmp_path, monkeypatch, size):
    """Its disk is full for a while: the agent waits, and trains nothing twice."""
    seen = fails(
        monkeypatch, "_take", lambda: StorageError("the disk is full"), 3, lambda site, said, row: not said.inspected
    )
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=2, recipe={"size": size}))
        assert view.line.state == "finished", view.line.error
    assert len(seen) == 3 + 3, "two trainings, one evaluation"
    assert trained(tmp_path) == Counter({"s0 1": 1, "s0 2": 1})


async def test_a_server_that_fails_at_everything_else(tmp_path, monkeypatch):
    for name in ("_agenda", "_source"):
        fails(monkeypatch, name, lambda: StorageError("the disk is full"), 2)
    fails(monkeypatch, "_ring", lambda: HansaError("a defect"), 2)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        assert (await lab.run(job(tmp_path))).line.state == "finished"


async def test_an_answer_that_the_server_will_not_take(tmp_path, monkeypatch):
    """It is named as lost, once; nothing is trained again, nothing spins; what comes with it is taken."""
    real = Service._take
    tries = []

    def picky(self, site: str, said: Answer, row: object) -> object:
        if said.inline is not None and site == "s0":
            tries.append(said)
            raise JobError("not this one")
        return real(self, site, said, row)

    monkeypatch.setattr(Service, "_take", picky)
    async with loopback(tmp_path, ("s0", "s1")) as lab:
        for site in ("s0", "s1"):
            await lab.start(site)
        view = await lab.run(job(tmp_path, ("s0", "s1"), rounds=1, cohort={"quorum": 2}))
    assert view.line.state == "failed"
    assert "not this one" in view.line.error
    assert "s1" not in view.line.error
    assert len(tries) == agents.REFUSALS
    assert trained(tmp_path) == Counter({"s0 1": 1, "s1 1": 1})


async def test_a_defect_in_one_task(tmp_path, monkeypatch):
    """The others go on, the submitter learns of it, and it is not tried for ever."""
    real = joined.JoinedJob._perform
    tries = []

    async def broken(self, job, given, *rest):
        if self._site == "s1":
            tries.append(given.task)
            raise KeyError("defect")
        return await real(self, job, given, *rest)

    monkeypatch.setattr(joined.JoinedJob, "_perform", broken)
    async with loopback(tmp_path, ("s0", "s1")) as lab:
        for site in ("s0", "s1"):
            await lab.start(site)
        view = await lab.run(job(tmp_path, ("s0", "s1")))
    assert view.line.state == "finished"
    reasons = [absent["reason"] for record in view.records for absent in record["absent"]]
    assert reasons == ["A defect at the site: KeyError: 'defect'"] * 3
    assert len(tries) == len(set(tries))


async def test_a_server_restart_in_the_middle(tmp_path):
    lab = Loopback(tmp_path, ["s0"])
    async with lab.serving(), lab.lead() as lead:
        lab.write("s0")
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=10, recipe={"delay_s": 0.03}))
        await lead.until(id, "round 2:")
    async with lab.serving(), lab.lead() as lead:
        view = await lead.wait(id)
        assert view.line.state == "finished", view.line.error
        await lab.stop("s0")
    assert set(trained(tmp_path).values()) == {1}


@pytest.mark.parametrize("size", [4, LARGE])
async def test_the_same_bytes_after_the_agent_was_killed(tmp_path, monkeypatch, size):
    """Killed when the update is finished and before it is acknowledged: those bytes arrive, nothing is retrained."""
    real = Service._take
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    silent = True

    def silenced(self, site: str, said: Answer, row: object) -> object:
        if silent and said.missing is None and said.inspected is None:
            loop.call_soon_threadsafe(arrived.set)
            raise StorageError("not now")
        return real(self, site, said, row)

    monkeypatch.setattr(Service, "_take", silenced)
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        command = (
            sys.executable,
            "-c",
            "from hansa.cli.main import main; main()",
            "site",
            "start",
            str(lab.site("s0")),
        )
        first = await asyncio.create_subprocess_exec(*command, env=environment(), stderr=asyncio.subprocess.DEVNULL)
        id = await lead.submit(job(tmp_path, rounds=1, recipe={"size": size}))
        await asyncio.wait_for(arrived.wait(), 60)
        first.send_signal(signal.SIGKILL)
        await first.wait()
        (kept,) = (lab.site("s0") / "work" / "jobs" / id / "outbox").glob("[!.]*.hansa")
        data = kept.read_bytes()
        received: set[bytes] = set()
        updates = lab.made.server / "jobs" / id / "work" / "updates"

        def keeping(self, site: str, said: Answer, row: object) -> object:
            taken = real(self, site, said, row)
            received.update(path.read_bytes() for path in updates.glob("*.hansa"))
            return taken

        monkeypatch.setattr(Service, "_take", keeping)
        silent = False
        await lab.start("s0")
        view = await lead.wait(id)
        assert view.line.state == "finished", view.line.error
        assert data in received
        assert trained(tmp_path) == Counter({"s0 1": 1})


async def test_a_worker_that_dies_each_time(tmp_path):
    recipe = {
        "name": "mischief:build",
        "sites": ["s0", "s1"],
        "deeds": {"s1:2": "kill"},
        "diary": str(tmp_path / "diary"),
    }
    values = {"name": "m", "rounds": 3, "recipe": recipe, "evaluation": {"every": 0}, "directory": str(tmp_path)}
    async with loopback(tmp_path, ("s0", "s1")) as lab:
        for site in ("s0", "s1"):
            await lab.start(site)
        view = await lab.run(Job(**values, train={"optimizer": "sgd"}, baselines={"base": False, "local": False}))
    assert view.line.state == "finished", view.line.error
    assert [[absent["site"] for absent in record["absent"]] for record in view.records] == [[], ["s1"], []]
    assert "SIGKILL" in view.records[1]["absent"][0]["reason"]
    assert "attempt 3 of 3" in view.records[1]["absent"][0]["reason"]


async def test_a_worker_that_is_killed_once_costs_one_attempt(tmp_path):
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=5, recipe={"delay_s": 0.1}))
        await lead.until(id, "round 1:")
        (worker,) = workers_of(lab.site("s0"))
        worker.kill()
        view = await lead.wait(id)
        assert view.line.state == "finished"
        assert all(not record["absent"] for record in view.records)


@pytest.mark.parametrize(("num_bytes", "state"), [(1 << 20, "finished"), (1 << 30, "failed")])
async def test_memory_is_bounded(tmp_path, num_bytes, state):
    async with loopback(tmp_path) as lab:
        lab.write("s0", "resources = { max_memory_bytes = 500000000 }", recipes=["hungry:build"])
        await lab.start("s0")
        view = await lab.run(
            job(tmp_path, rounds=1, recipe={"name": "hungry:build", "bytes": num_bytes, "trained": None})
        )
    assert view.line.state == state
    if state == "failed":
        assert "more memory than it may take (500,000,000 bytes)" in view.line.error
        assert "attempt 3 of 3" in view.line.error


@pytest.mark.parametrize(("by", "num_bytes", "most"), [("children", 200 << 20, 400 << 20), ("torch", 4 << 30, 3 << 30)])
async def test_memory_is_bounded_however_it_is_taken(tmp_path, by, num_bytes, most):
    """By children that are within the limit each, and by torch, whose errors are no MemoryError."""
    async with loopback(tmp_path) as lab:
        lab.write("s0", f"resources = {{ max_memory_bytes = {most} }}", recipes=["hungry:build"])
        await lab.start("s0")
        recipe = {"name": "hungry:build", "bytes": num_bytes, "by": by, "trained": None}
        view = await lab.run(job(tmp_path, rounds=1, recipe=recipe))
    assert f"it needed more memory than it may take ({most:,} bytes" in view.line.error
    assert "attempt 3 of 3" in view.line.error


OWN = """
import json
import torch
import hansa.client as flare

class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)

def step():
    json.loads("{")

def main():
    flare.init()
    while flare.is_running():
        flare.receive()
        step()

if __name__ == "__main__":
    main()
"""


async def test_a_submitter_sees_his_own_frames_of_a_traceback(tmp_path, caplog):
    """And no path of the site's; its log has the whole, at the task that the submitter is told."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(OWN)
    async with loopback(tmp_path) as lab:
        lab.write("s0", recipes=["script"], signers=["ana"])
        await lab.start("s0")
        recipe = {"name": "script", "path": "code/train.py", "sites": 1}
        values = {"name": "toy", "rounds": 1, "recipe": recipe, "directory": str(tmp_path)}
        model = {"factory": "code/train.py:Model"}
        view = await lab.run(Job(**values, model=model, baselines={"base": False, "local": False}))
    said = view.line.error
    assert 'File "code/train.py", line 11, in step' in said
    assert "JSONDecodeError: Expecting property name" in said
    assert "json/decoder.py" not in said
    assert str(tmp_path) not in said
    (task,) = re.findall(r"at task (\w+)\.", said)
    assert any(task in record.message and "json/decoder.py" in record.message for record in caplog.records)


async def test_a_defect_is_told_without_the_site_s_paths(tmp_path, caplog):
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1, recipe={"faults": {"s0:1": "raise"}}))
    reason = r"s0: lost: RuntimeError: the disk of this site is on fire\nThe site's log has .*, at task (\w+)\."
    (task,) = re.findall(reason, view.line.error)
    assert str(tmp_path) not in view.line.error
    assert any(task in record.message and "tests/toys.py" in record.message for record in caplog.records)


async def test_a_round_that_takes_too_long(tmp_path):
    async with loopback(tmp_path) as lab:
        lab.write("s0", max_task_s=1.0)
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1, recipe={"delay_s": 60}))
    assert "longer than the 1 s that this site allows" in view.line.error


async def test_an_aborted_job_ends_at_once_and_a_deleted_one_is_forgotten(tmp_path):
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=1, recipe={"delay_s": 1000}))
        async with asyncio.timeout(60):
            while not workers_of(lab.site("s0")):
                await asyncio.sleep(0.05)
            await lead.connection.call(AbortJob(id))
            while workers_of(lab.site("s0")):
                await asyncio.sleep(0.05)
            assert (lab.site("s0") / "work" / "jobs" / id).exists(), "it may be resumed"
            await lead.wait(id)
            await lead.connection.call(DeleteJob(id))
            while (lab.site("s0") / "work" / "jobs" / id).exists():
                await asyncio.sleep(0.05)


async def test_an_idle_worker_gives_its_memory_back(tmp_path, monkeypatch):
    """The other site takes long; the worker that waits ends, and the next round starts another."""
    for module in (agents, joined):
        monkeypatch.setattr(module, "IDLE_S", 0.1)
    async with loopback(tmp_path, ("s0", "s1")) as lab, lab.lead() as lead:
        for site in ("s0", "s1"):
            await lab.start(site)
        id = await lead.submit(job(tmp_path, ("s0", "s1"), rounds=2, recipe={"delay_s": {"s0": 0.0, "s1": 0.3}}))
        seen = set()
        waiting = asyncio.create_task(lead.wait(id))
        while not waiting.done():
            seen |= {worker.pid for worker in workers_of(lab.site("s0"))}
            await asyncio.sleep(0.02)
        assert waiting.result().line.state == "finished"
        assert len(seen) >= 2


async def test_a_task_that_is_withdrawn_while_it_waits_spares_the_worker(tmp_path):
    """Another task of the same job is at work, and nothing of that is lost."""
    async with loopback(tmp_path) as lab:
        lab.write("s0")
        from hansa.site.settings import load

        worker_asked = asyncio.Event()
        held = joined.JoinedJob(
            "id", "s0", Kit(lab.site("s0")), load(lab.site("s0") / "site.toml"), tmp_path / "job", tmp_path
        )

        async def ask(job, request):
            worker_asked.set()
            await asyncio.Event().wait()

        stopped = []
        held._worker.ask = ask  # type: ignore[method-assign]
        held._worker._stop = lambda reason: stopped.append(reason)  # type: ignore[method-assign,assignment]
        given = Assignment("t1", "id", "0" * 64, "inspect", "toy", 0, "", b"")

        async def join(connection, given):
            return job(tmp_path)

        held._join = join  # type: ignore[method-assign]
        first = asyncio.create_task(held.answer(None, given, lambda phase: None))  # type: ignore[arg-type]
        await worker_asked.wait()
        waits = asyncio.Event()
        second = asyncio.create_task(
            held.answer(
                None, Assignment("t2", *_rest(given)), lambda phase: waits.set() if phase == "waiting" else None
            )  # type: ignore[arg-type]
        )
        await waits.wait()
        second.cancel()
        await asyncio.wait({second})
        assert second.cancelled()
        assert stopped == []
        assert not first.done()
        first.cancel()
        await asyncio.wait({first})


def _rest(given: Assignment) -> list[object]:
    return [getattr(given, name) for name in Assignment.__struct_fields__[1:]]


async def test_agendas_that_flap(tmp_path, monkeypatch):
    """Every second agenda is empty of tasks: what was withdrawn is begun again, and the job comes to its end."""
    real = Service._agenda
    count = 0

    def flapping(self, site, have, open):
        nonlocal count
        count += 1
        found = real(self, site, have, open)
        if found.assignments and count % 2 and count < 12:
            self._desk.ring([site])
            found.assignments.clear()
        return found

    monkeypatch.setattr(Service, "_agenda", flapping)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, recipe={"delay_s": 0.02}))
        assert view.line.state == "finished", view.line.error


async def test_an_agenda_that_never_changes_is_asked_for_ever_more_slowly(tmp_path, monkeypatch):
    """A server that always has news, and never any, costs a site next to nothing."""
    real = Service._agenda
    times = []

    def noisy(self, site, have, open):
        times.append(time.monotonic())
        found = real(self, site, have, open)
        self._desk.ring([site])  # after it: there is news that the agenda does not tell of
        return found

    monkeypatch.setattr(Service, "_agenda", noisy)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        async with asyncio.timeout(30):
            while len(times) < 16:
                await asyncio.sleep(0.05)
    # Rings and requests have each their pace; of four that follow one another two are of a kind.
    assert times[-1] - times[-4] > 8 * 0.01


async def test_the_doorbell_brings_the_agenda(tmp_path, monkeypatch):
    """Round after round nobody has to ask for it."""
    real = Service.call
    asked = 0

    async def call(self, caller, request):
        nonlocal asked
        asked += isinstance(request, AskAgenda)
        return await real(self, caller, request)

    monkeypatch.setattr(Service, "call", call)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        assert (await lab.run(job(tmp_path, rounds=20))).line.state == "finished"
    assert asked < 10


async def test_an_agenda_from_before_an_answer_starts_nothing_again(tmp_path, monkeypatch):
    """It arrives when the answer has been acknowledged: what it has is not news."""
    attend, acknowledged = Service.attend, Outbox.acknowledged
    over, answered = asyncio.Event(), set()
    stale = 0

    def forget(self, task):
        acknowledged(self, task)
        answered.add(task)
        over.set()

    async def late(self, caller, request):
        nonlocal stale
        async for ring in attend(self, caller, request):
            yield ring
            given = [] if ring.agenda is None else ring.agenda.assignments
            if training := {each.task for each in given if each.kind == "train"}:
                while not training <= answered:
                    over.clear()
                    await over.wait()
                stale += 1
                number = ring.sequence + 1
                yield Ring(number, ring.roster, ring.lease_s, Agenda(number, ring.agenda.jobs, given))

    monkeypatch.setattr(Outbox, "acknowledged", forget)
    monkeypatch.setattr(Service, "attend", late)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        assert (await lab.run(job(tmp_path, rounds=3))).line.state == "finished"
    assert stale
    assert set(trained(tmp_path).values()) == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"task": "../../../escaped"},
        {"task": ".hidden"},
        {"task": "a/b"},
        {"course": "local./../../../escaped"},
        {"plan": "../../escaped"},
        {"plan": "", "kind": "train"},
        {"job": "another"},
    ],
)
async def test_assignments_that_lead_elsewhere(tmp_path, monkeypatch, change):
    """They are not taken up; what is sound beside them is."""
    real = Service._agenda

    def hostile(self, site, have, open):
        found = real(self, site, have, open)
        for given in found.assignments[:1]:
            names = Assignment.__struct_fields__
            values = {name: getattr(given, name) for name in names}
            found.assignments.append(Assignment(**{**values, "task": "zz", **change}))
        return found

    monkeypatch.setattr(Service, "_agenda", hostile)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path))
        assert view.line.state == "finished", view.line.error
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 7}, "signed with 0"),
        ({"round": 2}, "announced train, round 1"),
        ({"inbox": "topic"}, "from site to site"),
        ({"outbox": "../../x"}, "from site to site"),
    ],
)
async def test_plans_that_were_not_signed(tmp_path, monkeypatch, change, reason):
    import dataclasses

    real = Remote.publish

    def hostile(self, plan: Plan) -> str:
        return real(self, dataclasses.replace(plan, **change))

    monkeypatch.setattr(Remote, "publish", hostile)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1))
    assert reason in view.line.error
    assert not (tmp_path / "trained.txt").exists()


async def test_a_plan_that_is_no_plan(tmp_path, monkeypatch):
    def hostile(self: Remote, plan: Plan) -> str:
        path = self._plans / "junk"
        path.write_bytes(b"x" * 1000)
        return self._announce(path, describe(path))

    monkeypatch.setattr(Remote, "publish", hostile)
    monkeypatch.setattr(wire, "cuts", lambda path: [0, 1000])
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1))
    assert "can't be read" in view.line.error


async def test_a_model_larger_than_allowed(tmp_path):
    for size in (1000, LARGE):
        async with loopback(tmp_path / str(size)) as lab:
            lab.write("s0", max_model_bytes=5000)
            await lab.start("s0")
            view = await lab.run(job(tmp_path, rounds=1, recipe={"size": size}))
        assert "allows 5,000" in view.line.error or "at most 5,000" in view.line.error, view.line.error


async def test_streams_that_are_cut_give_way_to_polls(tmp_path, monkeypatch):
    """A proxy that cuts every connection after 0.4 s: the job ends all the same."""
    polled = asyncio.Event()
    real = Service.call

    async def call(self, caller, request):
        if isinstance(request, Poll):
            polled.set()
        return await real(self, caller, request)

    monkeypatch.setattr(Service, "call", call)
    async with loopback(tmp_path) as lab, relay(lab.port) as proxy:

        async def cutting() -> None:
            while True:
                await asyncio.sleep(0.4)
                proxy.cut()

        lab.write("s0", port=proxy.port)
        cutter = asyncio.create_task(cutting())
        try:
            await lab.start("s0")
            await asyncio.wait_for(polled.wait(), 60)
            view = await lab.run(job(tmp_path, rounds=4))
        finally:
            cutter.cancel()
        assert view.line.state == "finished", view.line.error
        assert proxy.dialled > 3
    assert set(trained(tmp_path).values()) == {1}


async def test_through_an_http_proxy(tmp_path):
    async with loopback(tmp_path) as lab, relay(lab.port, tunnels=True) as proxy:
        lab.write("s0", f'proxy = "http://127.0.0.1:{proxy.port}"')
        await lab.start("s0")
        view = await lab.run(job(tmp_path, recipe={"size": LARGE}))
        assert view.line.state == "finished", view.line.error
        assert set(proxy.targets) == {f"127.0.0.1:{lab.port}"}
        assert proxy.passed > 3 * 2 * 8 * LARGE


async def test_without_streams(tmp_path):
    async with loopback(tmp_path) as lab:
        lab.write("s0", "doorbell = false")
        await lab.start("s0")
        assert (await lab.run(job(tmp_path))).line.state == "finished"


async def test_a_base_that_travelled_once_is_not_sent_again(tmp_path):
    """The second job's bundle holds the same 5 MB of files, and a few kilobytes travel."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(os.urandom(5_000_000))
    async with loopback(tmp_path) as lab, relay(lab.port) as line, lab.lead() as lead:
        lab.write("s0", port=line.port)
        await lab.start("s0")
        slow = {"delay_s": 1000}
        for number in (1, 2):
            before = line.passed
            id = await lead.submit(job(tmp_path, rounds=1, seed=number, files=["base/**"], recipe=slow))
            files = lab.site("s0") / "work" / "jobs" / id / "files" / "base" / "model.safetensors"
            async with asyncio.timeout(60):
                while not files.exists() or files.stat().st_size != 5_000_000:
                    await asyncio.sleep(0.05)
            moved = line.passed - before
            assert moved > 5_000_000 if number == 1 else moved < 200_000, (number, moved)
        assert files.read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
        await lab.stop("s0")


async def test_a_bundle_that_changes(tmp_path, monkeypatch):
    """A job has one bundle: the server can't put another in its place, before or after a restart of the site."""
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=50, recipe={"delay_s": 0.05}))
        await lead.until(id, "round 1:")
        real = Service._agenda

        def hostile(self, site, have, open):
            found = real(self, site, have, open)
            for given in found.assignments:
                given.bundle = "f" * 64
            return found

        monkeypatch.setattr(Service, "_agenda", hostile)
        seen = [event.text async for event in lead.events(id)]
        assert any("another bundle" in text for text in seen), seen[-3:]


async def test_two_agents_in_one_folder(tmp_path):
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        with pytest.raises(StorageError, match="Another agent"):
            await agents.Agent(lab.site("s0")).run()


async def test_a_disk_that_is_full_for_good(tmp_path, monkeypatch):
    """The round is not trained first; the answer says why, and the job's other sites go on."""
    import shutil

    monkeypatch.setattr(agents, "PATIENCE_S", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1))
    assert "0 are free" in view.line.error
    assert not (tmp_path / "trained.txt").exists()


@pytest.mark.parametrize(("patience_s", "times"), [(600.0, 2), (0.5, 1)])
async def test_a_disk_that_is_full_when_a_round_is_done(tmp_path, monkeypatch, patience_s, times):
    """What is trained is kept and not trained again; patience begins with the failure, however long the round took."""
    real, failed = Outbox.finish, []

    def finish(self, task, outcome, notes=()):
        if outcome == Outcome() and len(failed) < times:
            failed.append(task)
            raise StorageError("the disk is full")
        return real(self, task, outcome, notes)

    monkeypatch.setattr(Outbox, "finish", finish)
    monkeypatch.setattr(agents, "PATIENCE_S", patience_s)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1, recipe={"delay_s": 0.15}))
    assert view.line.state == "finished", view.line.error
    assert len(failed) == times
    assert trained(tmp_path) == Counter({"s0 1": 1})


def cut_in_half(path: Path) -> None:
    """Let the second half of a file be zeros, as a power cut may leave a file that is not synced."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize("size", [4, LARGE])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("plans/*.hansa", cut_in_half),
        ("plans/*.hansa", lambda path: path.write_bytes(b"")),
        ("plans/*.manifest", lambda path: path.write_bytes(b"")),
        ("bundle.manifest", lambda path: path.write_bytes(b"")),
    ],
)
async def test_a_power_cut_at_a_site(tmp_path, monkeypatch, size, name, spoil):
    """What was not synced is empty, or zeros: it is fetched again, and nothing wrong is trained on."""
    real = joined.JoinedJob._perform
    at_work, cut = asyncio.Event(), False
    plans: set[bytes] = set()

    async def perform(self, job, given, path, *rest):
        plans.add(path.read_bytes())
        if given.kind == "train" and not cut:
            at_work.set()
            await asyncio.Event().wait()
        return await real(self, job, given, path, *rest)

    monkeypatch.setattr(joined.JoinedJob, "_perform", perform)
    async with loopback(tmp_path, lease_s=60) as lab, lab.lead() as lead:
        await lab.start("s0")
        id = await lead.submit(job(tmp_path, rounds=1, recipe={"size": size, "varied": True}))
        await asyncio.wait_for(at_work.wait(), 60)
        await lab.stop("s0")
        (first,) = plans
        for path in (lab.site("s0") / "work" / "jobs" / id).glob(name):
            spoil(path)
        cut = True
        await lab.start("s0")
        view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error
    assert first in plans
    assert len(plans) == 2, "one to train, one to evaluate"


async def test_a_plan_that_is_damaged_while_it_is_needed(tmp_path, monkeypatch):
    """It is fetched again, not refused: the server has nothing to do with it."""
    real = wire.open_plan
    tries = []

    def spoilt(path: Path, *, lazily: bool) -> Plan:
        tries.append(path)
        if len(tries) == 1:
            path.write_bytes(path.read_bytes()[:1000])
        return real(path, lazily=lazily)

    monkeypatch.setattr(wire, "open_plan", spoilt)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=1, recipe={"size": LARGE, "varied": True}))
    assert view.line.state == "finished", view.line.error
    assert tries[0] == tries[1]


async def test_a_large_update_is_written_over_an_old_plan(tmp_path, monkeypatch):
    """The worker, which reads a large plan while it trains, does not hold it open until the next one comes."""
    taken: list[tuple[str, bool]] = []
    real = storage.Spares.take

    def take(self: storage.Spares, path: Path, *size: int) -> bool:
        found = real(self, path, *size)
        if path.parent.name == "outbox":
            taken.append((path.name, found))
        return found

    monkeypatch.setattr(storage.Spares, "take", take)
    async with loopback(tmp_path) as lab:
        await lab.start("s0")
        view = await lab.run(job(tmp_path, rounds=4, recipe={"size": 600_000, "varied": True}))
    assert view.line.state == "finished", view.line.error
    assert [found for _, found in taken] == [False, True, True, True], taken


async def test_one_signed_job_under_many_ids(tmp_path, monkeypatch):
    """A server offers what was signed once as many jobs: one is taken up, for good."""
    refusals: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    ids = [f"forged-{i}" for i in range(4)]

    def take(self, answers):
        for _, said in answers:
            reason = said.missing.reason if said.missing else ""
            loop.call_soon_threadsafe(refusals.put_nowait, (said.job, reason))
        raise StorageError("not now")

    monkeypatch.setattr(Service, "_take_all", take)
    async with loopback(tmp_path) as lab:
        path = tmp_path / "bundle.zip"
        manifest = describe(path, pack(job(tmp_path), path, Kit(lab.made.users["ana"])))
        given = [Assignment(f"t-{id}", id, manifest.digest, "inspect", "toy", 0, "", b"") for id in ids]
        monkeypatch.setattr(Service, "_agenda", lambda self, site, have, open: Agenda(1, ids, given))
        monkeypatch.setattr(Service, "_source", lambda self, caller, asked: (path, manifest))
        for _ in range(2):  # the second time after a restart
            found: dict[str, str] = {}
            await lab.start("s0")
            async with asyncio.timeout(60):
                while len(found) < len(ids):
                    id, reason = await refusals.get()
                    found[id] = reason
            await lab.stop("s0")
            assert sum("this site knows it as forged" in reason for reason in found.values()) == len(ids) - 1
        assert len(list((lab.site("s0") / "work" / "history").iterdir())) == 1


async def test_no_more_jobs_at_once_than_the_site_allows(tmp_path, monkeypatch):
    """The others wait until it is over."""
    most = 0
    real = joined.JoinedJob._perform

    async def perform(self, *args):
        nonlocal most
        most = max(most, len(workers_of(lab.site("s0"))))
        return await real(self, *args)

    monkeypatch.setattr(joined.JoinedJob, "_perform", perform)
    async with loopback(tmp_path, lease_s=1) as lab, lab.lead() as lead:
        lab.write("s0", max_jobs=1)
        await lab.start("s0")
        submitted = [await lead.submit(job(tmp_path, rounds=2, recipe={"delay_s": 0.01})) for _ in range(2)]
        for id in submitted:
            assert (await lead.wait(id)).line.state == "finished"
    assert most == 1


async def test_whom_a_job_waits_for_is_told(tmp_path):
    """The log and `hansa job show` name the site that has no room, and why."""
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        lab.write("s0", max_jobs=1)
        await lab.start("s0")
        first = await lead.submit(job(tmp_path, rounds=1, recipe={"delay_s": 1000}))
        async with asyncio.timeout(60):
            while not workers_of(lab.site("s0")):
                await asyncio.sleep(0.05)
        second = await lead.submit(job(tmp_path, rounds=1))
        why = "the site is at work on as many jobs as it takes at once: 1 (policy.max_jobs)"
        await lead.until(second, f"s0 waits: {why}")
        view = await lead.show(second)
        assert view.activities["s0"].startswith("checking: waiting for")
        assert view.activities["s0"].endswith(f"({why})")
        await lead.connection.call(AbortJob(first))
        assert (await lead.wait(second)).line.state == "finished"


async def test_no_server_is_waited_for(tmp_path):
    lab = Loopback(tmp_path, ["s0"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        lab.port = free.getsockname()[1]
    lab.write("s0")
    joined_at = asyncio.Event()
    agent = asyncio.create_task(agents.Agent(lab.site("s0")).run(joined_at))
    await asyncio.wait({agent}, timeout=0.5)
    assert not agent.done()
    async with lab.serving():
        await asyncio.wait_for(joined_at.wait(), 60)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
