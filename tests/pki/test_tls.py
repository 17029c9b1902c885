# SPDX-License-Identifier: Apache-2.0
"""Real handshakes: who is let in by TLS alone, before any roster is asked."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from hansa.errors import AccessError
from hansa.pki.authority import Authority
from hansa.pki.identity import Role, now
from hansa.pki.kit import Kit
from members import Members, members


def context(side: int, kit: Kit, root: Kit | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(kit.directory / "certificate.pem", kit.directory / "key.pem")
    made.load_verify_locations(cadata=(root or kit).authority_pem().decode())
    return made


def meet(server: Kit, client: Kit, name: str | None = None, *, trusting: Kit | None = None) -> bytes | str:
    """Return the client's certificate as the server saw it, or what a side said against the other."""
    ours, theirs = socket.socketpair()
    seen: list[bytes | str] = []

    def serve() -> None:
        try:
            with context(ssl.PROTOCOL_TLS_SERVER, server).wrap_socket(theirs, server_side=True) as end:
                seen.append(ssl.DER_cert_to_PEM_cert(end.getpeercert(binary_form=True) or b"").encode())
                end.send(b"!")
        except (ssl.SSLError, OSError) as error:
            seen.append(f"server: {error}")
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        made = context(ssl.PROTOCOL_TLS_CLIENT, client, trusting)
        with made.wrap_socket(ours, server_hostname=name or client.server_name) as end:
            if end.recv(1) != b"!":
                raise ssl.SSLError("cut")
    except (ssl.SSLError, OSError) as error:
        ours.close()
        thread.join()
        return f"client: {error}; {seen[0]!r}"
    thread.join()
    return seen[0]


def test_a_member_meets_the_server(lab: Members) -> None:
    for client in (lab.site, lab.lead, lab.admin, lab.observer):
        for name in ("server.lab.hansa", "localhost", "127.0.0.1"):
            seen = meet(lab.server, client, name)
            assert isinstance(seen, bytes), seen
            assert lab.server.roster().admit(seen) == client.identity


def test_another_authority_is_refused_by_both_sides(lab: Members, tmp_path: Path) -> None:
    twin = members(tmp_path, "lab")
    assert "verify failed" in meet(lab.server, twin.site)
    said = meet(lab.server, twin.site, trusting=lab.site)  # a client that would trust this server
    assert "server: [SSL: CERTIFICATE_VERIFY_FAILED]" in said


@pytest.mark.parametrize("who", ["site", "lead", "admin"])
def test_nobody_poses_as_the_server(lab: Members, who: str) -> None:
    assert "client: [SSL: CERTIFICATE_VERIFY_FAILED]" in meet(getattr(lab, who), lab.observer)


def test_the_server_is_no_client(lab: Members) -> None:
    assert "server: [SSL: CERTIFICATE_VERIFY_FAILED]" in meet(lab.server, lab.server)


def test_an_address_that_is_not_the_servers(lab: Members) -> None:
    assert "Hostname mismatch" in meet(lab.server, lab.site, "elsewhere.example.org")


def test_an_expired_certificate(own: Members, tmp_path: Path) -> None:
    past = Authority.open(own.authority.directory, clock=lambda: now() - timedelta(days=2))
    late = past.issue(tmp_path / "late", Role.LEAD, "late", lifetime=timedelta(days=1))
    server = past.issue(tmp_path / "server", Role.SERVER, "old", lifetime=timedelta(days=1))
    # The authority is younger than that, so its own date is not what TLS objects to.
    assert "certificate has expired" in meet(own.server, late)
    assert "certificate has expired" in meet(server, own.site)


def test_a_revoked_server_is_refused_by_those_who_know(own: Members, tmp_path: Path) -> None:
    roster = own.authority.revoke("main", "stolen")
    assert isinstance(meet(own.server, own.site), bytes), "who has the old roster can't know"
    own.site.update_roster(roster.data)
    assert "Hostname mismatch" in meet(own.server, own.site)
    new = own.authority.issue(tmp_path / "new", Role.SERVER, "new")
    assert isinstance(meet(new, own.site), bytes)
    own.server.update_roster(own.authority.roster.data)
    with pytest.raises(AccessError, match="stolen"):
        own.server.roster().admit(own.server.certificate_pem())


def test_a_revoked_client_passes_tls_and_no_further(own: Members) -> None:
    own.server.update_roster(own.authority.revoke("hospital-a", "sold").data)
    seen = meet(own.server, own.site)
    assert isinstance(seen, bytes)
    with pytest.raises(AccessError, match="revoked on"):
        own.server.roster().admit(seen)


@pytest.fixture
def address(lab: Members) -> Iterator[str]:
    """A gRPC server that answers with the certificate it saw."""

    def answer(_: bytes, call: grpc.ServicerContext) -> bytes:
        (pem,) = call.auth_context()["x509_pem_cert"]
        return bytes(pem)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("who", {"am_i": grpc.unary_unary_rpc_method_handler(answer)})]
    )
    key, certificate = lab.server.pair()
    trust = grpc.ssl_server_credentials([(key, certificate)], lab.server.authority_pem(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", trust)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_grpc_sees_the_same_certificate(lab: Members, address: str, tmp_path: Path) -> None:
    def ask(kit: Kit, name: str) -> bytes:
        key, certificate = kit.pair()
        trust = grpc.ssl_channel_credentials(lab.site.authority_pem(), key, certificate)
        with grpc.secure_channel(address, trust, [("grpc.ssl_target_name_override", name)]) as channel:
            answer: bytes = channel.unary_unary("/who/am_i")(b"", timeout=20)
            return answer

    pem = ask(lab.site, lab.site.server_name)
    assert lab.server.roster().admit(pem) == lab.site.identity
    with pytest.raises(grpc.RpcError) as refused:
        ask(lab.site, "server-1.lab.hansa")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.RpcError) as refused:
        ask(members(tmp_path).site, lab.site.server_name)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
