# SPDX-License-Identifier: Apache-2.0
"""Certificates say who somebody is, and nothing that is no such certificate is taken for one."""

from __future__ import annotations

import base64
import contextlib
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import AccessError, JobError
from hansa.pki.identity import (
    FEDERATION,
    MAX_PEM_BYTES,
    NAME,
    Claim,
    Role,
    identity_of,
    now,
    read_certificate,
    read_root,
    server_name,
)
from members import Members

NAMES = st.from_regex(NAME, fullmatch=True)
FEDERATIONS = st.from_regex(FEDERATION, fullmatch=True)


def forged(
    key: Any = None,
    *,
    uris: tuple[str, ...] = ("hansa://lab/site/hospital-a",),
    ca: bool | None = False,
    signer: Any = None,
) -> bytes:
    """A certificate signed by itself, of whatever shape."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(days=1))
        .not_valid_after(now() + timedelta(days=1))
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer or key, algorithm).public_bytes(Encoding.PEM)


def test_a_certificate_names_its_holder(lab: Members) -> None:
    site = identity_of(lab.site.certificate_pem())
    assert (site.federation, site.role, site.name, site.site) == ("lab", Role.SITE, "hospital-a", None)
    assert (site.member, site.at_site, site.scopes) == ("site/hospital-a", "hospital-a", frozenset())
    assert site.serial > 2**64
    assert now() + timedelta(days=364) < site.expires < now() + timedelta(days=366)
    admin = identity_of(lab.admin.certificate_pem())
    assert (admin.role, admin.site, admin.at_site) == (Role.ADMIN, "hospital-a", "hospital-a")
    assert identity_of(lab.lead.certificate_pem()).at_site is None
    assert identity_of(lab.server.certificate_pem()).at_site is None


def test_the_forger_of_these_tests_can_make_a_good_one() -> None:
    assert identity_of(forged()).name == "hospital-a"


@pytest.mark.parametrize(
    "uri",
    [
        "hansa://lab/root/x",
        "hansa://lab/site/",
        "hansa://lab/site/.x",
        "hansa://lab/site/a/b",
        "hansa://lab/site/" + "a" * 101,
        "hansa://lab/site/a%2e",
        "hansa://lab/site/x\n",
        "hansa://LAB/site/x",
        "hansa://-lab/site/x",
        "hansa://lab/site/x?",
        "hansa://lab/site/x?scopes=",
        "hansa://lab/site/x?scopes=b,a",
        "hansa://lab/site/x?scopes=a,a",
        "hansa://lab/site/x?admin=1",
        "hansa://lab/site/x?site=y",
        "hansa://lab/admin/x",
        "hansa://lab/admin/x?site=y&site=z",
        "hansa://lab/admin/x?scopes=list&site=y",
        "hansa:lab/site/x",
        "https://lab/site/x",
    ],
)
def test_a_uri_out_of_form_names_nobody(uri: str) -> None:
    with pytest.raises(AccessError, match="names no one member"):
        identity_of(forged(uris=(uri,)))


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        (lambda: forged(uris=("hansa://lab/site/x", "hansa://lab/lead/x")), "names no one member"),
        (lambda: forged(uris=()), "subjectAltName|SubjectAlternativeName|extension"),
        (lambda: forged(ca=True), "authority"),
        (lambda: forged(ca=None), "extension"),
        (lambda: forged(ec.generate_private_key(ec.SECP384R1())), "not P-256"),
        (lambda: forged(ed25519.Ed25519PrivateKey.generate()), "not P-256"),
        (lambda: forged(rsa.generate_private_key(65537, 2048)), "not P-256"),
        (lambda: forged() + forged(), "too many values"),
        (lambda: b"", "no certificate"),
        (lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate"),
        (lambda: forged() + b" " * MAX_PEM_BYTES, "bytes"),
    ],
)
def test_what_is_no_members_certificate(pem: Any, reason: str) -> None:
    with pytest.raises(AccessError, match=reason):
        identity_of(pem())


@pytest.mark.parametrize(
    "pem",
    [
        lambda: forged(uris=("hansa://lab",)),
        lambda: forged(ca=True),
        lambda: forged(ca=True, uris=()),
        lambda: forged(ca=True, uris=("lab",)),
        lambda: forged(ca=True, uris=("hansa://lab",), signer=ec.generate_private_key(ec.SECP256R1())),
        lambda: b"no",
    ],
)
def test_what_is_no_authority(pem: Any) -> None:
    with pytest.raises(AccessError, match="no authority's certificate"):
        read_root(pem())
    assert read_root(forged(ca=True, uris=("hansa://lab",))).federation == "lab"


@given(FEDERATIONS, st.sampled_from(Role), NAMES, NAMES, st.sets(st.sampled_from(["list", "show", "submit"])))
def test_a_claim_is_read_as_it_was_written(federation: str, role: Role, name: str, site: str, scopes: set[str]) -> None:
    claim = Claim.of(federation, role, name, site if role is Role.ADMIN else None, scopes)
    identity = identity_of(forged(KEY, uris=(claim.uri,)))
    assert (identity.federation, identity.role, identity.name) == (federation, role, name)
    assert (identity.site, identity.scopes, identity.uri) == (claim.site, frozenset(scopes), claim.uri)


KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Lab", Role.SITE, "a"), "can't name a federation"),
        (("a.b", Role.SITE, "a"), "can't name a federation"),
        (("a" * 64, Role.SITE, "a"), "can't name a federation"),
        (("lab", Role.SITE, "a/b"), "can't be a name"),
        (("lab", Role.SITE, "../a"), "can't be a name"),
        (("lab", Role.SITE, ""), "can't be a name"),
        (("lab", Role.ADMIN, "a"), "give its name"),
        (("lab", Role.ADMIN, "a", "b c"), "can't be a name"),
        (("lab", Role.LEAD, "a", "b"), "Only an admin"),
    ],
)
def test_a_claim_that_can_not_be(arguments: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Claim.of(*arguments)


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def pem(data: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(data) + b"-----END CERTIFICATE-----\n"


@given(st.binary(max_size=400) | st.binary(max_size=400).map(pem))
def test_noise_is_an_access_error(data: bytes) -> None:
    with pytest.raises(AccessError):
        read_certificate(data)
    with pytest.raises(AccessError):
        read_root(data)


@given(st.data())
def test_a_mutated_certificate_is_refused_or_read(lab: Members, data: st.DataObject) -> None:
    source = bytearray(der(data.draw(st.sampled_from([lab.site, lab.server])).certificate_pem()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(source) - 1))
        source[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    for read in (read_certificate, read_root):
        with contextlib.suppress(AccessError):  # and nothing else
            read(pem(bytes(source)))


def test_the_name_of_servers() -> None:
    assert server_name("a" * 63).startswith("server.")
    assert len({server_name("lab", generation) for generation in range(10)}) == 10
