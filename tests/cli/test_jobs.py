# SPDX-License-Identifier: Apache-2.0
"""`hansa job`, `hansa sites` and `hansa server audit` against a real server: documents, tables, exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shell
import toys
from hansa.lab import Lab, lab
from hansa.pki.identity import Role
from labs import person

Hansa = Callable[..., shell.Result]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(toys.job(), directory=tmp_path_factory.mktemp("lab") / "fed") as made:
        yield made


@pytest.fixture
def cli(there: Lab, hansa: Hansa, monkeypatch: pytest.MonkeyPatch) -> Hansa:
    """The command line of the lab's lead, whose kit the environment names."""
    monkeypatch.setenv("HANSA_KIT", str(there.user))
    monkeypatch.setenv("COLUMNS", "160")
    return hansa


def submitted(cli: Hansa, folder: Path, *words: str, **values: object) -> str:
    """Submit a job and return its id."""
    done = cli("job", "submit", shell.job_file(folder, **values), "--json", *words)
    assert done.code == 0, done.err
    return str(done.json["job"])


def test_submit_and_follow(cli: Hansa, folder: Path) -> None:
    done = cli("job", "submit", shell.job_file(folder), "--follow", "--json", "--set", "rounds=2")
    assert done.code == 0, done.err
    found = done.json
    assert (found["state"], found["rounds"], found["round"], found["submitter"]) == ("finished", 2, 2, "lead")
    assert found["sites"]["s0"] == {"answer": "ready", "at": ""}
    assert [record["round"] for record in found["records"]] == [1, 2]
    assert found["files"]["model/model.safetensors"] > 0
    assert "round 2/2, loss" in done.err
    shown = cli("job", "show", found["job"])
    assert shown.code == 0
    assert re.search(r"finished +round 2 of 2", shown.out)
    assert re.search(r"s1 +ready", shown.out)
    assert f"hansa job download {found['job']}" in shown.out
    assert cli("job", "show", found["job"], "--json").json == found


def test_list_logs_download_delete(cli: Hansa, folder: Path) -> None:
    id = submitted(cli, folder)
    followed = cli("job", "logs", id, "-f", "--json")
    assert followed.code == 0
    events = [json.loads(line) for line in followed.out.splitlines()]
    assert events[-1]["text"] == "finished"
    assert [event["number"] for event in events] == sorted(event["number"] for event in events)
    assert cli("job", "logs", id).out.count("3 of 3 sites") == 3
    assert [line["state"] for line in cli("job", "list", "--json").json if line["job"] == id] == ["finished"]
    assert re.search(rf"{id} +lead +finished +3/3", cli("job", "list").out)
    got = cli("job", "download", id, "--json")
    assert {Path(path).relative_to(folder / id).as_posix() for path in got.json["files"]} >= {"report.json"}
    assert (folder / id / "model" / "model.safetensors").stat().st_size > 0
    some = cli("job", "download", id, "model", "--to", "elsewhere")
    assert "1 files" in some.out
    assert [path.name for path in (folder / "elsewhere").rglob("*") if path.is_file()] == ["model.safetensors"]
    refused = cli("job", "delete", id)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert cli("job", "delete", id, "--yes", "--json").json == {"deleted": id}
    assert cli("job", "show", id).code == 2


def test_abort_and_resume(cli: Hansa, there: Lab, folder: Path) -> None:
    id = submitted(cli, folder, rounds=6, recipe={"name": "toys:build", "delay_s": 0.1}, baselines={"base": False})
    next(event for event in there.federation.follow(id) if event.kind == "round")
    running = cli("job", "show", id, "--json").json
    assert running["state"] == "running"
    assert cli("job", "abort", id, "--json").json["state"] == "aborted"
    followed = cli("job", "logs", id, "-f")
    assert followed.code == 130, "the exit code of a job that was followed is the job's"
    assert "hansa job resume" in followed.err
    assert "queued" in cli("job", "resume", id).out or there.federation.job(id).line.state in ("running", "finished")
    assert cli("job", "logs", id, "-f").code == 0
    again = cli("job", "resume", id, "--json")
    assert again.code == 2
    assert again.json["error"]["kind"] == "JobError"


@pytest.mark.parametrize(
    ("values", "code", "kind", "reason"),
    [
        ({"strategy": {"name": "scaffold"}, "train": {"optimizer": "adamw"}}, 5, "FitError", "scaffold"),
        ({"recipe": {"name": "mischief:build", "sites": ["s0", "s1", "s2"]}}, 6, "PolicyError", "is not allowed"),
        ({"recipe": {"name": "no-such"}}, 2, "JobError", "no-such"),
    ],
)
def test_a_followed_job_ends_with_the_code_of_its_error(
    cli: Hansa, folder: Path, values: dict[str, object], code: int, kind: str, reason: str
) -> None:
    file = shell.job_file(folder, **values)
    done = cli("job", "submit", file, "--follow", "--json", "--set", "cohort.quorum=1.0")
    assert done.code == code
    assert done.json["error"]["kind"] == kind
    assert reason in done.json["error"]["message"]
    last = cli("job", "list", "--json").json[-1]
    assert (last["state"], last["kind"]) == ("failed", kind)
    shown = cli("job", "show", last["job"])
    assert shown.code == 0, "to show a failed job is no failure"
    assert reason in shown.out


def test_sites(cli: Hansa, there: Lab) -> None:
    listed = cli("sites", "--json").json
    assert [(site["site"], site["state"]) for site in listed] == [(name, "connected") for name in there.sites]
    assert re.search(r"s2 +connected", cli("sites").out)


def test_who_one_is_decides(cli: Hansa, there: Lab, folder: Path) -> None:
    id = submitted(cli, folder)
    assert cli("job", "logs", id, "-f").code == 0
    olga = str(person(there, Role.OBSERVER, "olga"))
    assert id in cli("job", "list", "--as", olga).out
    refused = cli("job", "download", id, "--as", olga, "--json")
    assert refused.code == 10
    assert refused.json["error"]["kind"] == "AccessError"
    assert not list((folder / id).rglob("*"))
    assert cli("job", "delete", id, "--yes", "--as", olga).code == 10
    audited = cli("server", "audit", str(there.folder("server")), "--json").json
    entries = [(row["actor"], row["action"], row["subject"], row["outcome"]) for row in audited]
    assert ("observer/olga", "delete", id, "refused") in entries
    assert any(
        actor == "lead/lead" and action == "submit" and outcome == "done" for actor, action, _, outcome in entries
    )
    table = cli("server", "audit", str(there.folder("server"))).out
    assert re.search(rf"observer/olga +delete +{id} +refused", table)


def test_no_kit_no_server_no_database(hansa: Hansa, folder: Path, there: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANSA_KIT", raising=False)
    nobody = hansa("job", "list")
    assert nobody.code == 2
    assert "--as DIR" in nobody.err
    assert hansa("server", "audit", str(folder)).code == 7
    kit = person(there, Role.OBSERVER, "otto")
    (kit / "client.toml").write_text("server = 5")
    wrong = hansa("sites", "--as", str(kit))
    assert wrong.code == 2
    assert "server" in wrong.err
