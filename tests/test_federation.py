# SPDX-License-Identifier: Apache-2.0
"""The Python client against a real server and real agents: what each role may do, and what outlasts mishaps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import toys
from hansa import federation as module
from hansa.core.config import parse
from hansa.errors import (
    AccessError,
    FitError,
    HansaError,
    InterruptedRunError,
    JobError,
    PolicyError,
    SiteError,
    StorageError,
    UnreachableError,
    WireError,
)
from hansa.federation import Federation, failure
from hansa.lab import Lab, lab
from hansa.pki.identity import Role
from hansa.pki.provision import provision
from hansa.simulation.run import run
from hansa.transport.messages import JobLine
from labs import person

LASTING = {"rounds": 400, "recipe": {"delay_s": 0.05}}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(toys.job(), directory=tmp_path_factory.mktemp("lab") / "fed") as made:
        yield made


@pytest.fixture
def lead(there: Lab) -> Federation:
    return there.federation


def until(federation: Federation, id: str, kind: str) -> None:
    """Follow a job until its log has a line of a kind."""
    next(event for event in federation.follow(id) if event.kind == kind)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_job_from_submission_to_results(lead: Federation, tmp_path: Path) -> None:
    job = toys.job(output={"dir": str(tmp_path / "runs")})
    id = lead.submit(job)
    lines = [event.text for event in lead.follow(id)]
    assert lines[-1] == "finished"
    assert sum("3 of 3 sites" in line for line in lines) == 4
    view = lead.job(id)
    assert (view.line.state, view.line.submitter, view.line.round) == ("finished", "lead", 4)
    assert view.sites == {"s0": "ready", "s1": "ready", "s2": "ready"}
    assert [record["round"] for record in view.records] == [1, 2, 3, 4]
    assert id in [line.job for line in lead.jobs()]
    assert [(site.site, site.state) for site in lead.sites()] == [(name, "connected") for name in ("s0", "s1", "s2")]
    paths = lead.download(id, tmp_path / "got")
    assert {path.relative_to(tmp_path / "got").as_posix() for path in paths} == set(view.files)
    assert sha256(tmp_path / "got/model/model.safetensors") == sha256(run(job).model_directory / "model.safetensors")
    assert lead.download(id, tmp_path / "some", names=["model"]) == [tmp_path / "some/model/model.safetensors"]
    with pytest.raises(JobError, match=r"no result 'modle'.*model"):
        lead.download(id, tmp_path / "none", names=["modle"])
    assert not (tmp_path / "none").exists()
    assert failure(view.line) is None


def test_masks_are_settled_by_one_s_own_roster(lead: Federation) -> None:
    data = {"train": dict.fromkeys(("s0", "s1", "s2"), "none.npz")}
    job = parse({"name": "t", "recipe": {"name": "tabular-classification", "inputs": 2}, "data": data})
    prepared, why = lead.prepared(job)
    assert prepared.masks is not None
    assert prepared.masks.by_default
    assert "on, by default" in why
    two = job.model_copy(update={"cohort": job.cohort.model_copy(update={"sites": ["s0", "s1"]})})
    prepared, why = lead.prepared(two)
    assert prepared.masks is None
    assert "2 sites take part" in why
    assert lead.prepared(prepared)[0] == prepared, "settled once"


def test_one_key_is_one_job(lead: Federation) -> None:
    before = len(lead.jobs())
    first = lead.submit(toys.job(), key="once")
    assert lead.submit(toys.job(), key="once") == first
    assert lead.submit(toys.job(rounds=2)) != first
    assert len(lead.jobs()) == before + 2
    lead.wait(first)


def test_an_observer_sees_and_does_not_touch(there: Lab, lead: Federation, tmp_path: Path) -> None:
    id = lead.submit(toys.job())
    lead.wait(id)
    with Federation(person(there, Role.OBSERVER, "olga")) as olga:
        assert olga.job(id).line.job == id
        assert [event.text for event in olga.follow(id)][-1] == "finished"
        for forbidden in (
            lambda: olga.download(id, tmp_path),
            lambda: olga.submit(toys.job()),
            lambda: olga.delete(id),
            lambda: olga.abort(id),
            lambda: olga.resume(id),
        ):
            with pytest.raises(AccessError, match="olga"):
                forbidden()
    assert not list(tmp_path.iterdir())


def test_a_lead_s_job_is_his(there: Lab, lead: Federation, tmp_path: Path) -> None:
    id = lead.submit(toys.job())
    lead.wait(id)
    with Federation(person(there, Role.LEAD, "ben")) as ben:
        for forbidden in (lambda: ben.delete(id), lambda: ben.download(id, tmp_path), lambda: ben.resume(id)):
            with pytest.raises(AccessError, match="ben"):
                forbidden()
        assert lead.job(id).line.state == "finished"


def test_why_a_site_refuses_reaches_who_submitted(lead: Federation) -> None:
    recipe = {"name": "mischief:build", "sites": ["s0", "s1", "s2"]}
    view = lead.wait(lead.submit(toys.job(recipe=recipe, cohort={"quorum": 1.0})))
    assert view.line.state == "failed"
    reason = "refused: Recipe 'mischief:build' is not allowed at this site"
    assert all(said.startswith(reason) for said in view.sites.values())
    error = failure(view.line)
    assert isinstance(error, PolicyError)
    assert reason.partition(" ")[2] in str(error)


def test_abort_resume_and_delete(lead: Federation, tmp_path: Path) -> None:
    job = toys.job(rounds=8, recipe={"delay_s": 0.05}, output={"dir": str(tmp_path / "runs")})
    id = lead.submit(job)
    with pytest.raises(JobError, match="no results"):
        lead.download(id, tmp_path / "early")
    until(lead, id, "round")
    with pytest.raises(JobError, match="abort it first"):
        lead.delete(id)
    lead.abort(id)
    view = lead.wait(id)
    assert view.line.state == "aborted"
    assert isinstance(failure(view.line), InterruptedRunError)
    done = view.line.round
    lead.resume(id)
    assert lead.wait(id).line.state == "finished"
    lines = [event.text for event in lead.follow(id, wait=False)]
    assert f"Going on after round {done}." in lines
    lead.download(id, tmp_path / "got", names=["model"])
    assert sha256(tmp_path / "got/model/model.safetensors") == sha256(run(job).model_directory / "model.safetensors")
    lead.delete(id)
    for absent in (lambda: lead.job(id), lambda: lead.abort(id), lambda: list(lead.follow(id))):
        with pytest.raises(JobError, match=id):
            absent()


def test_a_failed_job_fails_of_its_own_kind(lead: Federation) -> None:
    unfit = toys.job(strategy={"name": "scaffold"}, train={"optimizer": "adamw"})
    error = failure(lead.wait(lead.submit(unfit)).line)
    assert isinstance(error, FitError)


class CutError(Exception):
    """Stands for whatever ends a download."""


def test_a_download_that_was_cut_off_goes_on(lead: Federation, tmp_path: Path) -> None:
    job = toys.job(rounds=1, recipe={"size": 2 << 20, "varied": True}, output={"dir": str(tmp_path / "runs")})
    id = lead.submit(job)
    assert lead.wait(id).line.state == "finished"
    reached = []

    def cut(name: str, done: int, total: int) -> None:
        reached.append(done)
        if done > total / 3:
            raise CutError

    with pytest.raises(CutError):
        lead.download(id, tmp_path, names=["model"], moved=cut)
    target = tmp_path / "model/model.safetensors"
    assert not target.exists(), "a file has its name when it is whole"
    assert target.with_name("model.safetensors.part").exists()
    again = []
    lead.download(id, tmp_path, names=["model"], moved=lambda name, done, total: again.append(done))
    assert min(again) > min(reached)
    assert sha256(target) == sha256(run(job).model_directory / "model.safetensors")
    again.clear()
    lead.download(id, tmp_path, names=["model"], moved=lambda name, done, total: again.append(done))
    assert again == [], "what is there is not fetched again"


def test_a_file_that_the_job_names_and_is_not_there(lead: Federation, tmp_path: Path) -> None:
    before = len(lead.jobs())
    with pytest.raises(JobError, match=r"notes\.txt"):
        lead.submit(toys.job(files=["notes.txt"], directory=str(tmp_path)))
    with pytest.raises(JobError, match="s9"):
        lead.submit(toys.job(cohort={"sites": ["s9"]}))
    assert len(lead.jobs()) == before


def test_a_kit_of_another_federation(there: Lab, tmp_path: Path) -> None:
    other = provision(tmp_path / "other", "other", there.address, ["s0"], ["eve"])
    with Federation(other.users["eve"]) as eve, pytest.raises(AccessError):
        eve.jobs()


def test_folders_that_are_no_kit(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--as DIR"):
        Federation(tmp_path)
    with pytest.raises(StorageError):
        Federation(tmp_path, "127.0.0.1:1")
    (tmp_path / "client.toml").write_text('sever = "127.0.0.1:1"')
    with pytest.raises(JobError, match="server"):
        Federation(tmp_path)


def test_quotas_and_a_server_that_goes(tmp_path: Path) -> None:
    with lab(toys.job(), directory=tmp_path / "fed", settings={"quota": {"jobs": 1}}) as small:
        id = small.federation.submit(toys.job(**LASTING))
        with pytest.raises(AccessError, match="may have 1"):
            small.federation.submit(toys.job())
        assert [line.job for line in small.federation.jobs()] == [id]
        user, address = small.user, small.address
        events = small.federation.follow(id)
        next(event for event in events if event.kind == "round")
        small.restart("server")
        assert next(event for event in events if event.kind == "round"), "the log goes on where it broke off"
        small.federation.abort(id)
    with Federation(user, patience_s=0.5) as away, pytest.raises(UnreachableError, match=address):
        away.jobs()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "a/", "", ".", "./a", "a\\b", "a\0b", "c:x"])
def test_names_that_could_lead_out_of_the_folder(name: str) -> None:
    with pytest.raises(WireError):
        module._check_name(name)
    module._check_name("model/model.safetensors")


@pytest.mark.parametrize(
    ("state", "kind", "error"),
    [
        ("failed", "QuorumError", HansaError),
        ("failed", "ZeroDivisionError", SiteError),
        ("failed", "annotations", SiteError),
        ("failed", "", SiteError),
        ("aborted", "", InterruptedRunError),
        ("finished", "", None),
        ("running", "", None),
    ],
)
def test_kinds_of_failure(state: str, kind: str, error: type[HansaError] | None) -> None:
    found = failure(JobLine("j-1", "j", "ana", state, 1, 0, "why", kind, "", "", ""))
    assert found is None if error is None else isinstance(found, error)
