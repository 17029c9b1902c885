# SPDX-License-Identifier: Apache-2.0
"""The authority signs what its operator means and nothing else, and loses nothing."""

from __future__ import annotations

import contextlib
import shutil
import stat
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import AccessError, HansaError, JobError, StorageError, VersionError, WireError
from hansa.pki import keys
from hansa.pki.authority import Authority
from hansa.pki.identity import Claim, Role, identity_of, now, read_certificate
from hansa.pki.kit import Kit
from hansa.pki.request import FORMAT, Reply, make_request, read_reply, read_request
from members import Members

SITE = Claim.of("lab", Role.SITE, "hospital-b")


def asked(claim: Claim = SITE, key: keys.PrivateKey | None = None) -> bytes:
    return make_request(key or keys.new_key(), claim)


def test_a_site_asks_and_the_authority_signs(own: Members, tmp_path: Path) -> None:
    key = keys.new_key()
    pem = own.authority.sign(asked(key=key), Role.SITE, "hospital-b")
    certificate = read_certificate(pem)
    assert certificate.identity == own.authority.roster.admit(pem)
    assert keys.public_bytes(certificate.public_key) == keys.public_bytes(key.public_key())
    assert certificate.identity.uri == "hansa://lab/site/hospital-b"


@pytest.mark.parametrize(
    ("claim", "arguments"),
    [
        (SITE, {"role": Role.SITE, "name": "hospital-c"}),
        (SITE, {"role": Role.LEAD, "name": "hospital-b"}),
        (Claim.of("mal", Role.SITE, "hospital-b"), {"role": Role.SITE, "name": "hospital-b"}),
        (Claim.of("lab", Role.ADMIN, "bo", "x"), {"role": Role.ADMIN, "name": "bo", "site": "y"}),
    ],
)
def test_a_request_for_something_else_is_not_signed(lab: Members, claim: Claim, arguments: Any) -> None:
    before = lab.authority.roster.version
    with pytest.raises(AccessError, match="Nothing was signed"):
        lab.authority.sign(asked(claim), **arguments)
    assert lab.authority.roster.version == before


def test_a_request_for_a_key_that_its_maker_does_not_hold(lab: Members) -> None:
    """The self-signature is by one key and the request is for another, as an impostor's would be."""
    victim, impostor = (x509.load_pem_x509_csr(asked()) for _ in range(2))
    whole = bytearray(victim.public_bytes(Encoding.DER))
    own_part = impostor.tbs_certrequest_bytes
    at = bytes(whole).index(victim.tbs_certrequest_bytes)
    assert len(own_part) == len(victim.tbs_certrequest_bytes)
    whole[at : at + len(own_part)] = own_part
    forged = x509.load_der_x509_csr(bytes(whole)).public_bytes(Encoding.PEM)
    with pytest.raises(AccessError, match="not signed by the key it is for"):
        lab.authority.sign(forged, Role.SITE, "hospital-b")


def test_only_p256_requests(lab: Members) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SITE.uri)])
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(AccessError, match="not P-256"):
        lab.authority.sign(pem, Role.SITE, "hospital-b")


@given(st.binary(max_size=500))
def test_noise_is_no_request(data: bytes) -> None:
    with pytest.raises(AccessError):
        read_request(data)
    with pytest.raises(AccessError):
        read_request(b"-----BEGIN CERTIFICATE REQUEST-----\n" + data + b"\n-----END CERTIFICATE REQUEST-----\n")


@given(st.data())
def test_a_mutated_request_asks_for_the_same_or_is_refused(data: st.DataObject) -> None:
    source = bytearray(REQUEST)
    place = data.draw(st.integers(0, len(source) - 1))
    source[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(AccessError):
        assert read_request(bytes(source)).claim == SITE


REQUEST = asked()


def test_a_second_key_needs_the_operators_word(own: Members) -> None:
    claim = Claim.of("lab", Role.SITE, "hospital-a")
    with pytest.raises(AccessError, match="Is this request really theirs"):
        own.authority.sign(asked(claim), Role.SITE, "hospital-a")
    second = own.authority.sign(asked(claim), Role.SITE, "hospital-a", another_key=True)
    assert own.authority.roster.admit(second)
    assert own.authority.roster.admit(own.site.certificate_pem()), "the first counts until it ends"


def test_people_may_have_several_keys(own: Members) -> None:
    pem = own.authority.sign(asked(Claim.of("lab", Role.LEAD, "ana")), Role.LEAD, "ana")
    assert own.authority.roster.admit(pem).name == "ana"


@pytest.mark.parametrize(
    ("role", "options", "error", "message"),
    [
        (Role.LEAD, {"scopes": ["sumbit"]}, JobError, "no scope 'sumbit'"),
        (Role.OBSERVER, {"scopes": ["submit"]}, JobError, "may not submit to begin with"),
        (Role.SITE, {"hosts": ["example.org"]}, JobError, "Only a server's"),
        (Role.SERVER, {"hosts": ["*.example.org"]}, JobError, "no DNS name"),
        (Role.SERVER, {"hosts": ["server.other.hansa"]}, JobError, "no DNS name"),
        (Role.SERVER, {"hosts": ["a b"]}, JobError, "no DNS name"),
        (Role.LEAD, {"lifetime": timedelta(0)}, JobError, "at least a minute"),
        (Role.LEAD, {"lifetime": timedelta(days=-1)}, JobError, "at least a minute"),
        (Role.LEAD, {"lifetime": timedelta(days=4000)}, JobError, "not beyond the authority's own end"),
        (Role.LEAD, {"lifetime": timedelta.max}, JobError, "not beyond the authority's own end"),
        (Role.ADMIN, {}, JobError, "give its name"),
    ],
)
def test_terms_that_can_not_be(lab: Members, role: Role, options: Any, error: type[HansaError], message: str) -> None:
    site = "x" if role is Role.ADMIN else None
    before = lab.authority.roster.version
    with pytest.raises(error, match=message):
        lab.authority.sign(asked(Claim.of("lab", role, "n", site)), role, "n", **options)
    assert lab.authority.roster.version == before


def names_of(pem: bytes) -> x509.SubjectAlternativeName:
    return x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_only_servers_carry_hosts(lab: Members) -> None:
    names = names_of(lab.server.certificate_pem())
    assert names.get_values_for_type(x509.DNSName) == ["server.lab.hansa", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    for kit in (lab.site, lab.lead, lab.admin, lab.observer):
        assert len(list(names_of(kit.certificate_pem()))) == 1


def test_renewal_is_the_same_again(own: Members) -> None:
    old = own.server.identity
    own.server.renewal()
    pem = own.authority.renew((own.server.directory / "request.pem").read_bytes())
    new = identity_of(pem)
    assert (new.uri, new.expires >= old.expires, new.serial == old.serial) == (old.uri, True, False)
    assert list(names_of(pem)) == list(names_of(own.server.certificate_pem()))
    assert own.authority.roster.admit(own.server.certificate_pem()) == old, "the old one counts until it ends"


def test_renewal_keeps_scopes_and_lifetime(own: Members, tmp_path: Path) -> None:
    kit = own.authority.issue(
        tmp_path / "short", Role.LEAD, "short", lifetime=timedelta(hours=8), scopes=["submit", "show"]
    )
    new = identity_of(own.authority.renew(kit.renewal()))
    assert new.scopes == {"submit", "show"}
    assert timedelta(hours=7.9) < new.expires - now() <= timedelta(hours=8)


def test_what_is_not_renewed(own: Members) -> None:
    with pytest.raises(AccessError, match="nothing to renew"):
        own.authority.renew(own.site.renewal(new_key=True))
    own.authority.revoke("hospital-a", "sold")
    with pytest.raises(AccessError, match="nothing to renew"):
        own.authority.renew(own.site.renewal())
    stolen = (own.lead.directory / "key.pem").read_bytes()
    with pytest.raises(AccessError, match="nothing to renew"):  # a lead's key makes no admin
        own.authority.renew(asked(Claim.of("lab", Role.OBSERVER, "cy"), keys.read_key(stolen, Path("key.pem"))))


def test_revoking(own: Members) -> None:
    serial = f"{own.lead.identity.serial:x}"
    roster = own.authority.revoke(serial.upper(), " left ")
    assert roster.revoked[serial].member == "lead/ana"
    assert roster.revoked[serial].reason == "left"
    assert roster.server_name == "server.lab.hansa"
    with pytest.raises(JobError, match="revoked already"):
        own.authority.revoke(serial, "again")
    with pytest.raises(JobError, match="no member and no certificate 'nobody'"):
        own.authority.revoke("nobody", "x")
    with pytest.raises(JobError, match="Give a reason"):
        own.authority.revoke("cy", "  ")
    own.authority.issue(own.authority.directory.parent / "cy2", Role.LEAD, "cy")
    with pytest.raises(JobError, match="several called cy: lead/cy, observer/cy"):
        own.authority.revoke("cy", "x")


def test_revoking_a_server_changes_the_name_that_clients_ask_for(own: Members) -> None:
    roster = own.authority.revoke("server/main", "stolen")
    assert roster.server_name == "server-1.lab.hansa"
    new = own.authority.sign(asked(Claim.of("lab", Role.SERVER, "main")), Role.SERVER, "main", hosts=["localhost"])
    assert names_of(new).get_values_for_type(x509.DNSName) == ["server-1.lab.hansa", "localhost"]
    assert own.authority.roster.admit(new)


def test_nothing_is_overwritten(own: Members) -> None:
    before = (own.authority.directory / "key.pem").read_bytes()
    with pytest.raises(StorageError, match="holds an authority already"):
        Authority.create(own.authority.directory, "lab")
    with pytest.raises(StorageError, match="holds a key already"):
        own.authority.issue(own.site.directory, Role.SITE, "other")
    assert (own.authority.directory / "key.pem").read_bytes() == before


def test_files(own: Members) -> None:
    for kit in (own.server, own.site, own.lead):
        assert stat.S_IMODE((kit.directory / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((own.authority.directory / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(own.authority.directory.stat().st_mode) == 0o700
    everything = list(own.authority.directory.parent.rglob("*"))
    assert not [path for path in everything if path.name.endswith(".tmp")]


def test_opening_what_is_no_authority(own: Members, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="`hansa pki init` makes one"):
        Authority.open(tmp_path)
    with pytest.raises(AccessError, match="no authority's certificate"):
        Authority.open(own.site.directory)
    shutil.copy(own.site.directory / "key.pem", own.authority.directory / "key.pem")
    with pytest.raises(AccessError, match="is not the key of"):
        Authority.open(own.authority.directory)
    (own.authority.directory / "key.pem").write_bytes(b"noise")
    with pytest.raises(AccessError, match="no private key"):
        Authority.open(own.authority.directory)


def test_a_federation_needs_a_dns_label(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="can't name a federation"):
        Authority.create(tmp_path / "x", "My Lab")
    assert not (tmp_path / "x").exists()


def test_two_operators_at_once_lose_nothing(own: Members, tmp_path: Path) -> None:
    def work(who: str) -> None:
        authority = Authority.open(own.authority.directory)
        for n in range(5):
            authority.issue(tmp_path / f"{who}-{n}", Role.LEAD, f"{who}-{n}")

    before = own.authority.roster
    threads = [threading.Thread(target=work, args=(who,)) for who in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = own.authority.roster
    assert after.version == before.version + 15
    for who in "xyz":
        for n in range(5):
            assert after.admit(Kit(tmp_path / f"{who}-{n}").certificate_pem())


def test_a_restored_authority_signs_above_what_is_held(own: Members) -> None:
    backup = own.authority.directory.parent / "backup"
    shutil.copytree(own.authority.directory, backup)
    own.authority.revoke("ana", "left")
    own.site.update_roster(own.authority.revoke("cy", "left").data)
    restored = Authority.open(backup)
    with pytest.raises(AccessError, match="older"):
        own.site.update_roster(restored.roster.data)
    assert own.site.update_roster(restored.refresh(above=own.site.roster().version).data)


@pytest.mark.parametrize(
    ("purpose", "kit", "good"),
    [
        ("sslclient", "site", True),
        ("sslserver", "site", False),
        ("sslserver", "server", True),
        ("sslclient", "server", False),
        ("sslclient", "lead", True),
    ],
)
def test_openssl_agrees(lab: Members, purpose: str, kit: str, good: bool) -> None:
    program = shutil.which("openssl")
    if not program:
        pytest.skip("needs the program openssl")
    folder = getattr(lab, kit).directory
    words = ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", "authority.pem"]
    words += ["-verify_hostname", "server.lab.hansa"] if kit == "server" else []
    done = subprocess.run([program, *words, "certificate.pem"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode == 0) is good, done.stderr
    if not good:
        assert "unsuitable certificate purpose" in done.stderr


def test_a_member_can_not_sign_members(lab: Members) -> None:
    path = lab.site.directory / "key.pem"
    key = keys.read_key(path.read_bytes(), path)
    site = x509.load_pem_x509_certificate(lab.site.certificate_pem())
    builder = (
        x509.CertificateBuilder()
        .subject_name(site.subject)
        .issuer_name(site.subject)
        .public_key(keys.new_key().public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(site.not_valid_before_utc)
        .not_valid_after(site.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("hansa://lab/lead/eve")]), critical=False
        )
    )
    with pytest.raises(AccessError, match="not signed by the authority"):
        lab.authority.roster.admit(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def test_an_authority_signs_no_authorities(lab: Members) -> None:
    root = x509.load_pem_x509_certificate(lab.authority.certificate_pem)
    limits = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    for kit in (lab.server, lab.site, lab.lead):
        leaf = x509.load_pem_x509_certificate(kit.certificate_pem())
        assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_even_the_authority_admits_nobody_of_another_federation(lab: Members) -> None:
    path = lab.authority.directory / "key.pem"
    root = x509.load_pem_x509_certificate(lab.authority.certificate_pem)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("hansa://other/lead/eve")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(root.subject)
        .issuer_name(root.subject)
        .public_key(keys.new_key().public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(root.not_valid_before_utc)
        .not_valid_after(root.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
    )
    pem = builder.sign(keys.read_key(path.read_bytes(), path), hashes.SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(AccessError, match="of another federation"):
        lab.authority.roster.admit(pem)


@given(st.binary(max_size=200))
def test_noise_is_no_reply(data: bytes) -> None:
    with pytest.raises(WireError):
        read_reply(data)


def test_replies(lab: Members) -> None:
    reply = lab.authority.reply(lab.site.certificate_pem())
    assert read_reply(reply.write()) == reply
    with pytest.raises(VersionError, match="format 2"):
        read_reply(Reply(FORMAT + 1, "", "", "").write())
