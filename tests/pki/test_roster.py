# SPDX-License-Identifier: Apache-2.0
"""A roster is the authority's or nothing, and admits those whose certificates count and nobody else."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import AccessError, HansaError, StorageError, VersionError, WireError
from hansa.pki import keys
from hansa.pki.authority import CLOCK_SKEW, RETENTION, Authority
from hansa.pki.identity import Role, identity_of, now
from hansa.pki.roster import MAX_BYTES, Body, Roster
from members import Members, members


def authority_key(authority: Authority) -> keys.PrivateKey:
    path = authority.directory / "key.pem"
    return keys.read_key(path.read_bytes(), path)


def sealed(authority: Authority, **changes: Any) -> bytes:
    """A roster that the true authority signed, changed."""
    body = msgspec.structs.replace(authority.roster.body, **changes)
    return Roster.seal(body, authority_key(authority), authority.certificate_pem).data


def test_everybody_listed_is_admitted(lab: Members) -> None:
    roster = lab.authority.roster
    for kit in (lab.server, lab.site, lab.lead, lab.admin, lab.observer):
        assert roster.admit(kit.certificate_pem()) == kit.identity
        assert kit.roster().body == roster.body
    assert set(roster.members) == {"server/main", "site/hospital-a", "lead/ana", "admin/bo", "observer/cy"}
    assert (roster.federation, roster.server_name, dict(roster.revoked)) == ("lab", "server.lab.hansa", {})


def test_another_federations_certificates_are_not_admitted(lab: Members, tmp_path: Path) -> None:
    twin = members(tmp_path, "lab")  # of the same name, by another authority
    with pytest.raises(AccessError, match="not signed by the authority of lab"):
        lab.authority.roster.admit(twin.site.certificate_pem())
    with pytest.raises(AccessError, match="no certificate of a federation's member"):
        lab.authority.roster.admit(lab.authority.certificate_pem)


def test_dates(lab: Members) -> None:
    roster, pem = lab.authority.roster, lab.site.certificate_pem()
    expires = identity_of(pem).expires
    assert roster.admit(pem, at=expires)
    with pytest.raises(AccessError, match=r"expired on .*`hansa pki renew`"):
        roster.admit(pem, at=expires + timedelta(seconds=1))
    begins = expires - timedelta(days=365) - CLOCK_SKEW
    assert roster.admit(pem, at=begins)
    with pytest.raises(AccessError, match="Set this machine's clock"):
        roster.admit(pem, at=begins - timedelta(seconds=1))


def test_an_expired_certificate_is_refused_now(tmp_path: Path) -> None:
    past = now() - timedelta(hours=9)
    authority = Authority.create(tmp_path / "authority", "lab", clock=lambda: past)
    kit = authority.issue(tmp_path / "ana", Role.LEAD, "ana", lifetime=timedelta(hours=8.5), scopes=["submit"])
    with pytest.raises(AccessError, match="expired"):
        authority.roster.admit(kit.certificate_pem())
    assert authority.roster.admit(kit.certificate_pem(), at=past), "its signatures can still be checked"


def test_an_unlisted_certificate_is_refused(own: Members) -> None:
    before = own.authority.roster
    late = own.authority.issue(own.authority.directory.parent / "late", Role.SITE, "late")
    with pytest.raises(AccessError, match="not in the roster"):
        before.admit(late.certificate_pem())
    assert own.authority.roster.admit(late.certificate_pem()).name == "late"


def test_a_revoked_certificate_is_refused_with_the_reason(own: Members) -> None:
    roster = own.authority.revoke("site/hospital-a", "laptop stolen")
    with pytest.raises(AccessError, match=r"was revoked on .*: laptop stolen"):
        roster.admit(own.site.certificate_pem())
    with pytest.raises(AccessError, match="revoked"):
        roster.admit(own.site.certificate_pem(), at=now() - timedelta(minutes=1))
    assert roster.admit(own.lead.certificate_pem())


def test_what_expired_long_ago_is_left_out(tmp_path: Path) -> None:
    clock = [now() - timedelta(days=400)]
    authority = Authority.create(tmp_path / "authority", "lab", clock=lambda: clock[0])
    for name in ("ana", "bo"):
        authority.issue(tmp_path / name, Role.LEAD, name, lifetime=timedelta(hours=8))
    authority.revoke("bo", "left")
    clock[0] += RETENTION
    kept = authority.refresh()
    assert set(kept.members) == {"lead/ana"}
    assert len(kept.revoked) == 1
    clock[0] += timedelta(days=1)
    assert not authority.refresh().members
    assert not authority.roster.revoked


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_no_changed_byte_changes_what_a_roster_says(lab: Members) -> None:
    true = lab.authority.roster
    accepted = []
    for place in range(len(true.data)):
        with contextlib.suppress(HansaError):
            accepted.append(Roster.read(flip(true.data, place), lab.authority.certificate_pem))
    assert len(accepted) <= 1, "the last letter of base64 has bits that mean nothing"
    assert all(roster.body == true.body for roster in accepted)


def test_a_tampered_roster_is_refused(own: Members) -> None:
    document = json.loads(own.authority.roster.data)
    document["roster"]["members"]["lead/mallory"] = document["roster"]["members"]["lead/ana"]
    with pytest.raises(AccessError, match="not signed by the authority of lab, or was altered"):
        Roster.read(json.dumps(document, separators=(",", ":")).encode(), own.authority.certificate_pem)


def test_a_roster_of_another_key_is_refused(lab: Members, tmp_path: Path) -> None:
    twin = members(tmp_path, "lab")
    with pytest.raises(AccessError, match="not signed by"):
        Roster.read(twin.authority.roster.data, lab.authority.certificate_pem)


def test_a_members_key_can_not_sign_a_roster(lab: Members) -> None:
    pem = (lab.server.directory / "key.pem").read_bytes()
    forged = Roster.seal(lab.authority.roster.body, keys.read_key(pem, Path("key.pem")), lab.authority.certificate_pem)
    with pytest.raises(AccessError, match="not signed by"):
        Roster.read(forged.data, lab.authority.certificate_pem)


def test_a_signature_for_another_purpose_is_no_rosters(lab: Members) -> None:
    payload = msgspec.json.encode(lab.authority.roster.body)
    signature = base64.b64encode(keys.sign(authority_key(lab.authority), "data", payload)).decode()
    with pytest.raises(AccessError, match="not signed by"):
        Roster.read(
            b'{"roster":' + payload + b',"signature":"' + signature.encode() + b'"}', lab.authority.certificate_pem
        )


def test_formats_and_federations(lab: Members) -> None:
    root = lab.authority.certificate_pem
    with pytest.raises(VersionError, match="format 2"):
        Roster.read(sealed(lab.authority, format=2), root)
    with pytest.raises(AccessError, match="'other', not of 'lab'"):
        Roster.read(sealed(lab.authority, federation="other"), root)
    with pytest.raises(WireError, match="bytes"):
        Roster.read(b" " * (MAX_BYTES + 1), root)


def test_an_older_roster_does_not_succeed_a_newer_one(own: Members) -> None:
    old = own.authority.roster
    new = own.authority.revoke("ana", "left")
    assert new.succeeds(old)
    assert not new.succeeds(new)
    with pytest.raises(AccessError, match="would bring revoked certificates back"):
        old.succeeds(new)
    other = Roster.read(sealed(own.authority, members={}), own.authority.certificate_pem)
    with pytest.raises(AccessError, match="two rosters of version"):
        other.succeeds(new)


def test_another_authoritys_roster_succeeds_nothing(lab: Members, tmp_path: Path) -> None:
    twin = members(tmp_path, "lab")
    with pytest.raises(AccessError, match="another authority"):
        twin.authority.revoke("ana", "left").succeeds(lab.authority.roster)


def test_loading(lab: Members, tmp_path: Path) -> None:
    path = lab.authority.directory / "roster.json"
    assert Roster.load(path, lab.authority.certificate_pem).body == lab.authority.roster.body
    with pytest.raises(StorageError, match="Can't read"):
        Roster.load(tmp_path / "roster.json", lab.authority.certificate_pem)


@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["roster", "signature", "format"]) | st.text(), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_noise_is_no_roster(lab: Members, data: bytes) -> None:
    with pytest.raises((WireError, AccessError)):
        Roster.read(data, lab.authority.certificate_pem)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from([1, "1", 2**70, -1, None]),
            "federation": st.sampled_from(["lab", "", 3]),
            "version": st.integers() | st.floats(allow_nan=False),
            "issued": st.text(max_size=20) | st.sampled_from(["2026-01-01T00:00:00", "2026-01-01T00:00:00Z"]),
            "generation": st.integers(),
            "members": st.dictionaries(st.text(max_size=5), st.lists(st.none() | st.just({})), max_size=2),
            "revoked": st.dictionaries(st.text(max_size=5), st.none() | st.just({}), max_size=2) | st.none(),
            "more": st.none(),
        },
    )
)
def test_even_what_the_authority_signs_is_checked(lab: Members, fields: dict[str, Any]) -> None:
    payload = json.dumps(fields).encode()
    signature = base64.b64encode(keys.sign(authority_key(lab.authority), "roster", payload))
    data = b'{"roster":' + payload + b',"signature":"' + signature + b'"}'
    try:
        roster = Roster.read(data, lab.authority.certificate_pem)
    except HansaError:
        return
    assert roster.version >= 1
    assert not roster.members.keys() & {"more"}
    with pytest.raises(AccessError):
        roster.admit(lab.site.certificate_pem())


@pytest.mark.parametrize("nest", [lambda n: b"[" * n, lambda n: b'{"roster":' * n])
def test_deep_nesting_is_no_roster(lab: Members, nest: Callable[[int], bytes]) -> None:
    with pytest.raises(WireError):
        Roster.read(nest(100_000), lab.authority.certificate_pem)


def test_a_body_without_a_time_zone_is_refused(lab: Members) -> None:
    payload = msgspec.json.encode(lab.authority.roster.body)
    with pytest.raises(msgspec.ValidationError, match="timezone"):
        msgspec.json.decode(payload.replace(b"Z", b""), type=Body)
    assert lab.authority.roster.issued.tzinfo is not None
    assert lab.authority.roster.issued <= datetime.now(UTC)
