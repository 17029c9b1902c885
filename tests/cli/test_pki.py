# SPDX-License-Identifier: Apache-2.0
"""``hansa pki`` and ``hansa provision``: a federation's life by commands alone."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shell
from hansa.pki.kit import Kit
from hansa.server import settings as server_settings
from hansa.site import settings as site_settings

Hansa = Callable[..., shell.Result]


@pytest.fixture
def lab(hansa: Hansa) -> Hansa:
    assert hansa("pki", "init", "authority", "--federation", "lab").code == 0
    return hansa


def join(hansa: Hansa, name: str = "hospital-a", role: str = "site", *words: str) -> None:
    """Let somebody ask, and the authority sign, and install it."""
    assert hansa("pki", "request", "--federation", "lab", "--role", role, "--name", name, "--dir", name).code == 0
    request, reply = f"{name}/request.pem", f"{name}.json"
    terms = ["--role", role, "--name", name, *words]
    done = hansa("pki", "sign", request, "--out", reply, "--authority", "authority", *terms)
    assert done.code == 0, done.err
    assert hansa("pki", "install", reply, "--dir", name).code == 0


def test_a_federations_life(lab: Hansa, folder: Path) -> None:
    fingerprint = lab("pki", "show", "authority", "--json").json["fingerprint"]
    asked = lab("pki", "request", "--federation", "lab", "--role", "site", "--name", "riga", "--dir", "riga")
    assert "Send it to the authority of lab" in asked.out
    assert stat.S_IMODE((folder / "riga" / "key.pem").stat().st_mode) == 0o600
    assert lab("pki", "show", "riga").out.split()[:2] == ["kind", "request"]
    terms = ["--authority", "authority", "--role", "site", "--name", "riga", "--out", "riga.json"]
    signed = lab("pki", "sign", "riga/request.pem", *terms, "--days", "30")
    assert "Signed site/riga until" in signed.out
    wrong = lab("pki", "install", "riga.json", "--dir", "riga", "--fingerprint", "00" * 32)
    assert wrong.code == 10
    assert "Nothing was installed" in wrong.err
    done = lab("pki", "install", "riga.json", "--dir", "riga", "--fingerprint", fingerprint)
    assert "riga is the kit of site/riga until" in done.out
    first = lab("pki", "show", "riga", "--json").json
    assert first["kind"] == "kit"
    assert first["counts"] is True
    assert first["may"] == {"attend": "own site", "withdraw": "own site"}
    assert first["authority_fingerprint"] == fingerprint

    assert "--renewal" in lab("pki", "renew", "--dir", "riga").out
    options = ["--authority", "authority", "--out", "next.json"]
    assert lab("pki", "sign", "riga/request.pem", "--renewal", *options).code == 0
    renewed = lab("pki", "install", "next.json", "--dir", "riga", "--json").json
    assert renewed["serial"] != first["serial"]

    gone = lab("pki", "revoke", "riga", "--reason", "left", "--authority", "authority", "--json").json
    assert gone["revoked"] == {first["serial"]: "site/riga", renewed["serial"]: "site/riga"}
    assert gone["renew_servers"] is False
    assert lab("pki", "roster", "--out", "roster.json", "--authority", "authority").code == 0
    taken = lab("pki", "take", "roster.json", "--dir", "riga", "--json").json
    assert taken["news"] is True
    assert lab("pki", "take", "roster.json", "--dir", "riga", "--json").json["news"] is False
    shown = lab("pki", "show", "riga")
    assert "no" in shown.out
    assert "left" in shown.out
    assert lab("pki", "show", "riga", "--json").json["counts"] is False


def test_a_new_key(lab: Hansa, folder: Path) -> None:
    join(lab)
    before = (folder / "hospital-a" / "key.pem").read_bytes()
    told = lab("pki", "renew", "--new-key", "--dir", "hospital-a").out
    assert "--role site --name hospital-a --another-key" in told
    terms = ["--authority", "authority", "--role", "site", "--name", "hospital-a", "--out", "next.json"]
    refused = lab("pki", "sign", "hospital-a/request.pem", *terms)
    assert (refused.code, "Is this request really theirs" in refused.err) == (10, True)
    assert lab("pki", "sign", "hospital-a/request.pem", *terms, "--another-key").code == 0
    assert lab("pki", "install", "next.json", "--dir", "hospital-a").code == 0
    assert (folder / "hospital-a" / "key.pem").read_bytes() != before
    assert Kit(folder / "hospital-a").identity.name == "hospital-a"


def test_a_short_credential(lab: Hansa) -> None:
    words = ["--role", "lead", "--name", "ana", "--hours", "8", "--scope", "submit", "--scope", "show"]
    made = lab("pki", "issue", *words, "--dir", "ana", "--authority", "authority", "--json").json
    assert (made["role"], made["scopes"]) == ("lead", ["show", "submit"])
    shown = lab("pki", "show", "ana/certificate.pem", "--json").json
    assert shown["may"] == {"submit": "any", "show": "any"}
    assert lab("pki", "issue", "--role", "lead", "--name", "ana", "--dir", "ana", "--authority", "authority").code == 7


def test_what_show_shows(lab: Hansa, folder: Path) -> None:
    join(lab)
    kinds = {
        "authority": "authority",
        "authority/roster.json": "roster",
        "authority/certificate.pem": "authority's certificate",
        "hospital-a": "kit",
        "hospital-a/certificate.pem": "certificate",
        "hospital-a/authority.pem": "authority's certificate",
        "hospital-a/roster.json": "roster",
        "hospital-a/request.pem": "request",
        "hospital-a.json": "reply",
    }
    for path, kind in kinds.items():
        assert lab("pki", "show", path, "--json").json["kind"] == kind
        assert kind in lab("pki", "show", path).out
    members = lab("pki", "show", "authority", "--json").json["members"]
    assert [(row["member"], row["state"]) for row in members] == [("site/hospital-a", "counts")]
    (folder / "elsewhere.json").write_bytes((folder / "authority" / "roster.json").read_bytes())
    assert "--authority authority.pem" in lab("pki", "show", "elsewhere.json").err
    root = "authority/certificate.pem"
    assert lab("pki", "show", "elsewhere.json", "--authority", root, "--json").json["kind"] == "roster"
    secret = lab("pki", "show", "authority/key.pem")
    assert (secret.code, secret.out) == (10, "")
    (folder / "noise").write_bytes(b"noise")
    assert lab("pki", "show", "noise").code == 10
    assert lab("pki", "show", "nothing").code == 7


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["init", "authority", "--federation", "lab"], 7, "holds an authority already"),
        (["init", "new", "--federation", "My Lab"], 2, "can't name a federation"),
        (["request", "--federation", "lab", "--role", "sight", "--name", "a"], 2, "Did you mean 'site'?"),
        (["request", "--federation", "lab", "--role", "admin", "--name", "a"], 2, "give its name"),
        (["sign", "none.pem", "--out", "x", "--role", "site", "--name", "a"], 7, "There is no authority"),
        (["sign", "none.pem", "--out", "x", "--authority", "authority"], 7, "Can't read none.pem"),
        (["install", "none.json"], 7, "Can't read none.json"),
        (["renew", "--dir", "none"], 7, "Can't read"),
        (["revoke", "nobody", "--reason", "x", "--authority", "authority"], 2, "no member and no certificate"),
        (["roster", "--out", "x/y/z", "--authority", "none"], 7, "There is no authority"),
        (["take", "none.json", "--dir", "none"], 7, "Can't read"),
        (
            ["issue", "--role", "lead", "--name", "a", "--dir", "d", "--authority", "authority", "--hours", "nan"],
            2,
            "no number of days or hours",
        ),
    ],
)
def test_mistakes_end_in_their_codes(lab: Hansa, words: list[str], code: int, message: str) -> None:
    done = lab("pki", *words)
    assert (done.code, message in done.err) == (code, True), done.err
    told = lab("pki", *words, "--json")
    assert told.json["error"]["exit_code"] == code


def test_signing_needs_the_operators_word(lab: Hansa, folder: Path) -> None:
    words = ["pki", "request", "--federation", "lab", "--role", "site", "--name", "riga", "--dir", "riga"]
    assert lab(*words).code == 0
    sign = ["pki", "sign", "riga/request.pem", "--authority", "authority", "--out", "reply.json"]
    assert "Give the --role and --name" in lab(*sign).err
    assert lab(*sign, "--role", "lead", "--name", "riga").code == 10
    assert lab(*sign, "--role", "site", "--name", "riga", "--renewal").code == 2
    assert lab(*sign, "--renewal").code == 10
    assert not (folder / "reply.json").exists()


def test_a_revoked_server_is_told_of(lab: Hansa) -> None:
    join(lab, "main", "server", "--host", "127.0.0.1")
    done = lab("pki", "revoke", "main", "--reason", "stolen", "--authority", "authority")
    assert "server-1.lab.hansa" in done.out
    assert "every server needs a new one" in done.out


def test_provision(hansa: Hansa, folder: Path) -> None:
    words = ["--federation", "lab", "--server", "127.0.0.1:9000", "--site", "a", "--site", "b", "--lead", "ana"]
    made = hansa("provision", "fed", *words, "--observer", "cy", "--admin", "a/bo", "--json").json
    assert sorted(made["sites"]) == ["a", "b"]
    assert sorted(made["users"]) == ["ana", "bo", "cy"]
    assert made["address"] == "127.0.0.1:9000"
    assert server_settings.load(folder / "fed" / "server" / "server.toml").listen == "127.0.0.1:9000"
    assert site_settings.load(folder / "fed" / "sites" / "a" / "site.toml").server == "127.0.0.1:9000"
    again = hansa("provision", "fed", *words)
    assert (again.code, "left as it is" in again.err) == (7, True)
    assert "fed/sites/a" in hansa("provision", "other/fed", *words).out
    assert hansa("provision", "new", *words, "--admin", "bo").code == 2


def test_the_command_line_loads_no_cryptography_for_its_help() -> None:
    code = "import sys; import hansa.cli.main; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_cryptography_the_message_says_what_to_install(folder: Path) -> None:
    prelude = "import sys; sys.modules['cryptography'] = None"
    done = shell.process(folder, "pki", "init", "authority", "--federation", "lab", prelude=prelude)
    assert done.code == 9
    assert "pip install 'hansa[network]'" in done.err
