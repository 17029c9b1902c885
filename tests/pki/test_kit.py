# SPDX-License-Identifier: Apache-2.0
"""A kit's key never leaves it, its files may change while it is in use, and nothing bad takes their place."""

from __future__ import annotations

import logging
import shutil
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import AccessError, HansaError, StorageError, WireError
from hansa.pki import kit as kits
from hansa.pki.authority import Authority
from hansa.pki.identity import Claim, Role, read_certificate, read_root
from hansa.pki.keys import public_bytes, read_key
from hansa.pki.kit import Kit, verify
from members import Members, members

CLAIM = Claim.of("lab", Role.SITE, "hospital-b")


def matches(kit: Kit) -> bool:
    key, certificate = kit.pair()
    return public_bytes(read_key(key, kit.directory).public_key()) == public_bytes(
        read_certificate(certificate).public_key
    )


def test_request_sign_install(own: Members, tmp_path: Path) -> None:
    folder = tmp_path / "hospital-b"
    request = kits.request(folder, CLAIM)
    key = (folder / "key.pem").read_bytes()
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert b"PRIVATE" not in request
    assert kits.request(folder, CLAIM) != b""
    assert (folder / "key.pem").read_bytes() == key, "a request made anew is over the same key"
    pem = own.authority.sign(request, Role.SITE, "hospital-b")
    fingerprint = read_root(own.authority.certificate_pem).fingerprint
    kit = Kit.install(folder, own.authority.reply(pem), authority=":".join(fingerprint.upper()))
    assert (kit.identity.uri, kit.federation, kit.server_name) == (CLAIM.uri, "lab", "server.lab.hansa")
    assert kit.key_pem() == key
    assert kit.certificate_pem() == pem
    assert kit.authority_pem() == own.authority.certificate_pem
    assert kit.roster().admit(pem) == kit.identity
    with pytest.raises(StorageError, match="hansa pki renew"):
        kits.request(folder, CLAIM)


def test_a_reply_that_is_not_installed(own: Members, tmp_path: Path) -> None:
    folder = tmp_path / "hospital-b"
    request = kits.request(folder, CLAIM)
    reply = own.authority.reply(own.authority.sign(request, Role.SITE, "hospital-b"))
    twin = members(tmp_path / "twin")
    others = twin.authority.reply(twin.authority.sign(request, Role.SITE, "hospital-b"))
    fingerprint = read_root(own.authority.certificate_pem).fingerprint
    for bad, message in (
        (others, "not the one you named"),
        (own.authority.reply(own.site.certificate_pem()), "for another key"),
        (msgspec.structs.replace(reply, authority=others.authority), "not the one you named"),
        (msgspec.structs.replace(reply, roster=others.roster), "not signed by the authority"),
        (msgspec.structs.replace(reply, certificate=others.certificate), "not signed by the authority"),
        (msgspec.structs.replace(reply, roster=own.site.roster().data.decode()), "not in the roster"),
    ):
        with pytest.raises(AccessError, match=message):
            Kit.install(folder, bad, authority=fingerprint)
        assert sorted(path.name for path in folder.iterdir()) == ["key.pem", "request.pem"]
    with pytest.raises(StorageError, match="There is no key"):
        Kit.install(tmp_path / "empty", reply)
    Kit.install(folder, reply)
    with pytest.raises(AccessError, match="another authority"):
        Kit.install(folder, others)


def test_renewal_needs_no_restart(own: Members) -> None:
    kit, before = own.site, own.site.identity
    other = Kit(kit.directory)  # as `hansa pki install` beside a running agent
    reply = own.authority.reply(own.authority.renew(kit.renewal()))
    Kit.install(kit.directory, reply)
    assert kit.identity.serial == other.identity.serial != before.serial
    assert matches(kit)
    assert kit.roster().version == own.authority.roster.version


def test_renewal_with_a_new_key(own: Members) -> None:
    kit, old = own.site, own.site.pair()
    request = kit.renewal(new_key=True)
    assert stat.S_IMODE((kit.directory / "next-key.pem").stat().st_mode) == 0o600
    assert kit.pair() == old, "until its certificate is there, the new key waits"
    reply = own.authority.reply(own.authority.sign(request, Role.SITE, "hospital-a", another_key=True))
    new = Kit.install(kit.directory, reply)
    assert kit.pair() == new.pair() != old
    assert matches(kit)
    assert not (kit.directory / "next-key.pem").exists()


def test_a_crash_before_the_new_key_took_the_old_ones_place(own: Members) -> None:
    kit = own.site
    request = kit.renewal(new_key=True)
    reply = own.authority.reply(own.authority.sign(request, Role.SITE, "hospital-a", another_key=True))
    waiting, current = ((kit.directory / name).read_bytes() for name in ("next-key.pem", "key.pem"))
    Kit.install(kit.directory, reply)
    (kit.directory / "next-key.pem").write_bytes(waiting)  # what is there between the two renames
    (kit.directory / "key.pem").write_bytes(current)
    assert matches(Kit(kit.directory))
    assert Kit(kit.directory).key_pem() == waiting
    assert kit.key_pem() == waiting


@pytest.mark.parametrize("name", ["certificate.pem", "roster.json", "authority.pem", "key.pem"])
@pytest.mark.parametrize("change", ["noise", "gone", "another federation's"])
def test_changed_files_that_are_bad_are_not_used(
    own: Members, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, change: str
) -> None:
    kit = own.site
    before = (kit.pair(), kit.authority_pem(), kit.roster().version)
    path = kit.directory / name
    good = path.read_bytes()
    if change == "noise":
        path.write_bytes(b"noise")
    elif change == "gone":
        path.unlink()
    else:
        shutil.copy(members(tmp_path / "twin").site.directory / name, path)
    with caplog.at_level(logging.WARNING):
        assert (kit.pair(), kit.authority_pem(), kit.roster().version) == before
    assert len(caplog.records) == 1
    assert "not used" in caplog.text
    if name != "authority.pem" or change != "another federation's":
        with pytest.raises(HansaError):
            Kit(kit.directory)
    path.write_bytes(good)
    assert kit.update_roster(own.authority.revoke("ana", "left").data)
    assert kit.roster().version == before[2] + 1


def test_a_roster_only_rises(own: Members, caplog: pytest.LogCaptureFixture) -> None:
    old = own.site.roster().data
    new = own.authority.revoke("ana", "left").data
    assert own.site.update_roster(new)
    assert not own.site.update_roster(new)
    assert Kit(own.site.directory).roster().revoked
    with pytest.raises(AccessError, match="would bring revoked certificates back"):
        own.site.update_roster(old)
    (own.site.directory / "roster.json").write_bytes(old)  # rolled back on disk, under a running agent
    assert own.site.roster().revoked
    assert "would bring revoked certificates back" in caplog.text


def test_a_roster_from_elsewhere_is_refused(own: Members, tmp_path: Path) -> None:
    held = (own.site.directory / "roster.json").read_bytes()
    twin = members(tmp_path)
    twin.authority.refresh(above=100)
    with pytest.raises(AccessError, match="not signed by"):
        own.site.update_roster(twin.authority.roster.data)
    with pytest.raises(WireError):
        own.site.update_roster(b"{}")
    assert (own.site.directory / "roster.json").read_bytes() == held


def test_a_running_kit_learns_of_a_revoked_server(own: Members) -> None:
    assert own.site.server_name == "server.lab.hansa"
    own.site.update_roster(own.authority.revoke("main", "stolen").data)
    assert own.site.server_name == "server-1.lab.hansa"


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_signatures(lab: Members, data: bytes, other: bytes) -> None:
    signature = lab.lead.sign(data)
    verify(data, signature, lab.lead.certificate_pem())
    if other != data:
        with pytest.raises(AccessError, match="not that of lead/ana"):
            verify(other, signature, lab.lead.certificate_pem())
    with pytest.raises(AccessError, match="not that of site/hospital-a"):
        verify(data, signature, lab.site.certificate_pem())
    with pytest.raises(AccessError):
        verify(data, other, lab.lead.certificate_pem())


def test_a_kit_that_is_not_whole(own: Members, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Can't read"):
        Kit(tmp_path)
    shutil.copy(own.lead.directory / "key.pem", own.site.directory / "key.pem")
    with pytest.raises(AccessError, match="for another key than the one in"):
        Kit(own.site.directory)


def test_a_kit_of_another_federation_than_its_roster(own: Members, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "authority", "other")
    for name, data in (("authority.pem", other.certificate_pem), ("roster.json", other.roster.data)):
        (own.site.directory / name).write_bytes(data)
    with pytest.raises(AccessError, match="two federations"):
        Kit(own.site.directory)
