# SPDX-License-Identifier: Apache-2.0
"""A laboratory's federation in one go: all of it or nothing of it."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import HansaError, JobError, StorageError
from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.pki.kit import Kit
from hansa.pki.provision import DEFAULT_PORT, provision, split_address


def test_everybody_has_a_kit(tmp_path: Path) -> None:
    made = provision(
        tmp_path / "deep" / "lab",
        "lab",
        "127.0.0.1:9000",
        ["a", "b"],
        ["ana"],
        observers=["cy"],
        admins={"bo": "a"},
        server_settings="# more = 1\n",
    )
    assert made.address == "127.0.0.1:9000"
    assert sorted(made.sites) == ["a", "b"]
    assert sorted(made.users) == ["ana", "bo", "cy"]
    roster = Authority.open(made.authority).roster
    roles = {"ana": Role.LEAD, "bo": Role.ADMIN, "cy": Role.OBSERVER}
    for name, folder in {"server": made.server, **made.sites, **made.users}.items():
        kit = Kit(folder)
        assert roster.admit(kit.certificate_pem()) == kit.identity
        assert kit.roster().version == roster.version
        assert kit.identity.name == name
        assert kit.identity.role is roles.get(name, Role.SERVER if name == "server" else Role.SITE)
        assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert Kit(made.users["bo"]).identity.site == "a"
    text = (made.server / "server.toml").read_text()
    assert tomllib.loads(text) == {"listen": "127.0.0.1:9000"}
    assert text.endswith("# more = 1\n")
    for folder, name in ((made.sites["a"], "site.toml"), (made.users["ana"], "client.toml")):
        assert tomllib.loads((folder / name).read_text()) == {"server": "127.0.0.1:9000"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["lab"]


@pytest.mark.parametrize(
    ("server", "listen", "address"),
    [
        ("fl.example.org", "0.0.0.0:8470", "fl.example.org:8470"),
        ("localhost:1", "127.0.0.1:1", "localhost:1"),
        ("10.0.0.7:443", "0.0.0.0:443", "10.0.0.7:443"),
        ("[::1]:443", "[::1]:443", "[::1]:443"),
        ("[2001:db8::1]", "[::]:8470", "[2001:db8::1]:8470"),
    ],
)
def test_addresses(tmp_path: Path, server: str, listen: str, address: str) -> None:
    made = provision(tmp_path / "lab", "lab", server, ["a"], [])
    assert tomllib.loads((made.server / "server.toml").read_text())["listen"] == listen
    assert tomllib.loads((made.sites["a"] / "site.toml").read_text())["server"] == address


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("Lab", "h", [], []), {}, "can't name a federation"),
        (("lab", "h:0", [], []), {}, "no address"),
        (("lab", "h:65536", [], []), {}, "no address"),
        (("lab", "https://h", [], []), {}, "no address"),
        (("lab", "-h-", [], []), {}, "no DNS name"),
        (("lab", "h", ["a", "A"], []), {}, "comes twice"),
        (("lab", "h", [], ["ana"]), {"observers": ["ana"]}, "comes twice"),
        (("lab", "h", ["../a"], []), {}, "can't be a name"),
        (("lab", "h", [], ["/etc"]), {}, "can't be a name"),
        (("lab", "h", ["a"], []), {"admins": {"bo": "b"}}, "no such site"),
    ],
)
def test_what_can_not_be_leaves_nothing(tmp_path: Path, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        provision(tmp_path / "lab", *arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    provision(tmp_path / "lab", "lab", "h", ["a"], [])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(StorageError, match="left as it is"):
        provision(tmp_path / "lab", "lab", "h", ["a"], [])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="left as it is"):
        provision(tmp_path / "file", "lab", "h", ["a"], [])
    (tmp_path / "file").unlink()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()


@given(st.text(max_size=30) | st.from_regex(r"[a-z.\[\]:0-9]{0,20}", fullmatch=True))
def test_addresses_are_split_or_refused(text: str) -> None:
    try:
        host, port = split_address(text)
    except HansaError:
        return
    assert host
    assert 0 < port < 65536
    assert text in (host, f"[{host}]") or text.rpartition(":")[0] in (host, f"[{host}]")
    if text == host:
        assert port == DEFAULT_PORT
