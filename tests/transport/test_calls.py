# SPDX-License-Identifier: Apache-2.0
"""Calls and streams over real TLS: replies, errors, who is let in, and what a broken network does to them."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import AccessError, HansaError, JobError, UnreachableError, VersionError, WireError
from hansa.pki.identity import Role, identity_of
from hansa.pki.kit import Kit
from hansa.transport import messages, protocol
from hansa.transport.client import Connection
from hansa.transport.messages import Attend, Follow, Poll, Report, Ring, Submit
from hansa.transport.pieces import describe
from hansa.transport.server import Server, serve
from relay import relay

from .conftest import Depot, Dial, Federation

REQUESTS = {
    "Poll": Poll(1, "0.1", 4, 0.5),
    "AskAgenda": messages.AskAgenda(["a"]),
    "Report": Report([messages.Activity("t", "working", 1.5)]),
    "Answer": messages.Answer("j", "t", inline=bytes(messages.INLINE_BYTES)),
    "AskRoster": messages.AskRoster(),
    "Submit": Submit("0" * 64, "k"),
    "ListJobs": messages.ListJobs(),
    "ShowJob": messages.ShowJob("j"),
    "AbortJob": messages.AbortJob("j"),
    "WithdrawSite": messages.WithdrawSite("j", "s"),
    "ResumeJob": messages.ResumeJob("j"),
    "DeleteJob": messages.DeleteJob("j"),
    "ListSites": messages.ListSites(),
}


def test_every_call_is_tried() -> None:
    assert set(REQUESTS) == {kind.__name__ for kind in messages.CALLS}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_call_has_its_reply(dial: Dial, depot: Depot, request_: messages.AskAgenda) -> None:
    async with dial() as connection:
        reply = await connection.call(request_)
    assert type(reply) is type(request_).reply
    assert depot.calls == [("site/riga", request_)]


async def test_the_doorbell_rings_until_it_is_left(dial: Dial, depot: Depot) -> None:
    async with dial() as connection:
        bell = connection.attend(Attend(1, "0.1"))
        for number in (3, 4):
            depot.bell.put_nowait(number)
            assert (await anext(bell)).sequence == number
        await bell.aclose()  # type: ignore[attr-defined]
        await depot.closed.wait()


async def test_a_log_ends(dial: Dial) -> None:
    async with dial() as connection:
        assert [event.number async for event in connection.follow(Follow("j", 1, False))] == [1, 2]


async def test_errors_travel(dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    async with dial() as connection:
        with pytest.raises(JobError, match="There is no strategy 'fedvag'") as met:
            await connection.call(Submit("0" * 64, "typo"))
        assert (met.value.job, met.value.site, met.value.round) == ("a", "riga", 3)
        with pytest.raises(HansaError, match=r"error [0-9a-f]{8}") as met:
            await connection.call(Submit("0" * 64, "defect"))
        assert "secret" not in str(met.value)
        number = re.findall("error ([0-9a-f]{8})", str(met.value))[0]
        logged = next(record for record in caplog.records if number in record.getMessage())
        assert logged.exc_info
        assert "secret detail" in str(logged.exc_info[1])
        assert await connection.call(messages.ListJobs()) == messages.JobLines([])


@pytest.mark.parametrize(
    "error",
    [
        AccessError("No."),
        UnreachableError("Away.", site="riga"),
        WireError("ü" * 4000),
        JobError("x", job="j", site="s", round=9),
    ],
)
def test_an_error_is_itself_after_the_journey(error: HansaError) -> None:
    back = protocol.raised(protocol.problem(error))
    assert type(back) is type(error)
    assert error.message.startswith(back.message)
    assert (back.job, back.site, back.round) == (error.job, error.site, error.round)
    assert len(protocol.problem(error)) < 7000, "HTTP/2 peers take 8 KiB of metadata"


@pytest.mark.parametrize("name", ["KeyError", "os", "annotations", "SUCCESS", "NewError", ""])
def test_an_error_of_an_unknown_kind_is_a_plain_one(name: str) -> None:
    data = protocol.encode(messages.Problem(name, "It broke."))
    assert type(protocol.raised(data)) is HansaError


@given(st.binary(max_size=300))
def test_a_problem_of_any_bytes_is_an_error_of_ours(data: bytes) -> None:
    assert isinstance(protocol.raised(data), HansaError)


# Who is let in


async def refusal(connection: Connection) -> HansaError:
    async with connection:
        with pytest.raises(HansaError) as met:
            await connection.call(messages.ListJobs())
    return met.value


async def test_a_site_of_another_federation(dial: Dial, tmp_path: Path, depot: Depot) -> None:
    stranger = Federation(tmp_path / "other", "other").site
    error = await refusal(dial(stranger))
    assert isinstance(error, AccessError)
    assert "did not sign" in str(error)
    assert depot.calls == []


async def test_a_certificate_that_the_server_does_not_know(
    federation: Federation, server: Server, tmp_path: Path, depot: Depot
) -> None:
    """The same names under another authority: only the server can tell."""
    other = Federation(tmp_path / "other", federation.authority.federation)
    (other.site.directory / "authority.pem").write_bytes(federation.server.authority_pem())
    port = server.port

    async with asyncio.timeout(30):
        channel = grpc.aio.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(federation.server.authority_pem(), *other.site.pair()),
            [("grpc.ssl_target_name_override", federation.site.server_name)],
        )
        with pytest.raises(grpc.aio.AioRpcError) as met:
            await channel.unary_unary("/hansa.Federation/ListJobs")(b"\x80", metadata=protocol.METADATA)
        await channel.close()
    assert met.value.code() is grpc.StatusCode.UNAVAILABLE
    assert depot.calls == []


async def test_no_certificate_at_all(federation: Federation, server: Server, depot: Depot) -> None:
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{server.port}",
        grpc.ssl_channel_credentials(federation.server.authority_pem()),
        [("grpc.ssl_target_name_override", federation.site.server_name)],
    )
    with pytest.raises(grpc.aio.AioRpcError) as met:
        await channel.unary_unary("/hansa.Federation/ListJobs")(b"\x80", metadata=protocol.METADATA)
    await channel.close()
    assert met.value.code() is grpc.StatusCode.UNAVAILABLE
    assert depot.calls == []


async def test_a_site_can_not_pose_as_the_server(federation: Federation, depot: Depot, dial: Dial) -> None:
    impostor = federation.kit(Role.SITE, "narva")
    fake = await serve(depot, impostor, "127.0.0.1", 0)
    error = await refusal(dial(port=fake.port, patience_s=0))
    await fake.stop()
    assert isinstance(error, AccessError)
    assert depot.calls == []


async def test_a_certificate_that_no_roster_lists(federation: Federation, dial: Dial) -> None:
    before = federation.site.roster().data
    late = federation.kit(Role.SITE, "narva")
    (late.directory / "roster.json").write_bytes(before)
    late = Kit(late.directory)
    error = await refusal(dial(late))
    assert isinstance(error, AccessError)
    assert "not in the roster" in str(error)
    federation.tell(federation.server)
    async with dial(late) as connection:
        await connection.call(messages.ListJobs())


async def test_a_newcomer_brings_the_roster_that_lists_him(federation: Federation, dial: Dial) -> None:
    async with dial(federation.kit(Role.SITE, "narva")) as connection:
        await connection.call(messages.ListJobs())
    assert "site/narva" in federation.server.roster().members


async def test_an_expired_certificate(federation: Federation, dial: Dial, depot: Depot) -> None:
    federation.age(federation.site)
    error = await refusal(dial())
    assert isinstance(error, AccessError)
    assert "expired" in str(error)
    assert depot.calls == []


async def test_an_expired_server(federation: Federation, depot: Depot, dial: Dial) -> None:
    federation.age(federation.server)
    stale = await serve(depot, federation.server, "127.0.0.1", 0)
    error = await refusal(dial(port=stale.port, patience_s=0))
    await stale.stop()
    assert isinstance(error, UnreachableError)
    assert "has expired" in str(error)


async def test_revocation_ends_calls_and_live_streams(federation: Federation, dial: Dial, depot: Depot) -> None:
    async with dial() as connection:
        bell = connection.attend(Attend(1, "0.1"))
        depot.bell.put_nowait(1)
        await anext(bell)
        federation.authority.revoke("site/riga", "its key was copied")
        federation.tell(federation.server)
        with pytest.raises(AccessError, match="its key was copied"):
            await anext(bell)
        with pytest.raises(AccessError, match="its key was copied"):
            await connection.call(messages.ListJobs())
        await depot.closed.wait()


async def test_who_is_revoked_hears_nothing_more(
    federation: Federation, dial: Dial, depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until the patrol comes by: a ring may tell as much as a reply."""
    monkeypatch.setattr("hansa.transport.server.PATROL_S", 1000.0)
    unwatched = await serve(depot, federation.server, "127.0.0.1", 0)
    async with dial(port=unwatched.port) as connection:
        bell = connection.attend(Attend(1, "0.1"))
        depot.bell.put_nowait(1)
        await anext(bell)
        federation.authority.revoke("site/riga", "its key was copied")
        federation.tell(federation.server)
        depot.bell.put_nowait(2)
        with pytest.raises(AccessError, match="its key was copied"):
            await anext(bell)
    await unwatched.stop()


async def test_a_revoked_server_is_left(federation: Federation, dial: Dial, depot: Depot) -> None:
    async with dial(patience_s=0) as connection:
        await connection.call(messages.ListJobs())
        federation.authority.revoke("server/main", "its key was copied")
        federation.tell(federation.site)
        with pytest.raises(AccessError, match=r"server-1\.lab\.hansa"):
            await connection.call(messages.ListJobs())


# Renewal


async def test_both_ends_are_renewed_without_a_restart(federation: Federation, dial: Dial, depot: Depot) -> None:
    async with dial(patience_s=0) as connection:
        await connection.call(messages.ListJobs())
        bell = connection.attend(Attend(1, "0.1"))
        depot.bell.put_nowait(1)
        await anext(bell)
        before = federation.server.pair(), federation.site.pair()
        federation.renew(federation.server)
        federation.renew(federation.site)
        federation.tell(federation.server)
        assert (federation.server.pair(), federation.site.pair()) != before
        federation.authority.revoke(f"{identity_of(before[1][1]).serial:x}", "replaced")
        federation.tell(federation.server)
        await connection.call(messages.ListJobs())
        with pytest.raises(AccessError, match="replaced"):
            await anext(bell)
        assert await served(federation, dial) == federation.server.certificate_pem()


async def served(federation: Federation, dial: Dial) -> bytes:
    """Return the certificate that the server shows now."""
    context = ssl.create_default_context(cadata=federation.site.authority_pem().decode())
    context.set_alpn_protocols(["h2"])
    host, port = dial().address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=federation.site.server_name)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


# The network


async def test_a_server_that_is_not_there(dial: Dial) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        error = await refusal(dial(port=free.getsockname()[1], patience_s=0.5))
    assert isinstance(error, UnreachableError)
    assert "connection refused" in str(error)


@pytest.mark.parametrize(
    ("address", "cause"),
    [("no-such-host.invalid:443", "has no address"), ("localhost", "HOST:PORT"), ("[::1:5", "HOST:PORT"), ("", "HOST")],
)
async def test_an_address_that_leads_nowhere(federation: Federation, address: str, cause: str) -> None:
    error = await refusal(Connection(federation.site, address, proxy="", patience_s=0))
    assert isinstance(error, UnreachableError)
    assert cause in str(error)


async def test_something_else_that_listens(dial: Dial) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
        error = await refusal(dial(port=other.sockets[0].getsockname()[1], patience_s=0))
    assert isinstance(error, HansaError)
    assert "127.0.0.1" in str(error)


async def test_a_call_outlasts_a_restart_of_the_server(federation: Federation, depot: Depot, dial: Dial) -> None:
    first = await serve(depot, federation.server, "127.0.0.1", 0)
    async with dial(port=first.port, patience_s=None) as connection:
        await connection.call(messages.ListJobs())
        await first.stop()
        call = asyncio.create_task(connection.call(messages.ListJobs()))
        await asyncio.wait({call}, timeout=0.5)
        assert not call.done()
        second = await serve(depot, federation.server, "127.0.0.1", first.port)
        assert await call == messages.JobLines([])
        await second.stop()


async def test_a_stream_says_that_it_broke(dial: Dial, server: Server, depot: Depot) -> None:
    async with relay(server.port) as network, dial(port=network.port) as connection:
        bell = connection.attend(Attend(1, "0.1"))
        depot.bell.put_nowait(1)
        await anext(bell)
        network.cut()
        with pytest.raises(UnreachableError, match="broke"):
            await anext(bell)
        assert await connection.call(Poll(1, "0.1", 6, 0)) == Ring(7, 1, 30.0)


async def test_through_a_proxy(dial: Dial, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with relay(server.port, tunnels=True) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        async with dial(proxy=address) as connection:
            await connection.call(messages.ListJobs())
        assert proxy.targets == [f"127.0.0.1:{server.port}"]
        for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", address)
        async with dial(proxy=None) as connection:
            await connection.call(messages.ListJobs())
        assert len(proxy.targets) == 2
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with dial(proxy=None) as connection:
            await connection.call(messages.ListJobs())
        assert len(proxy.targets) == 2


async def test_a_proxy_that_says_no(dial: Dial) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden by policy\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as proxy:
        address = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        error = await refusal(dial(proxy=address, patience_s=0))
    assert isinstance(error, UnreachableError)
    assert "403 Forbidden by policy" in str(error)


async def test_a_port_in_use(server: Server, federation: Federation, depot: Depot) -> None:
    with pytest.raises(UnreachableError, match="address already in use"):
        await serve(depot, federation.server, "127.0.0.1", server.port)


async def test_a_host_that_is_not_ours(federation: Federation, depot: Depot) -> None:
    with pytest.raises(UnreachableError, match=r"Can't listen on 192\.0\.2\.1:0: cannot assign"):
        await serve(depot, federation.server, "192.0.2.1", 0)


# Hostile callers


@pytest.fixture
async def raw(federation: Federation, server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """The site's channel, for bytes of any kind."""
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{server.port}",
        grpc.ssl_channel_credentials(federation.site.authority_pem(), *federation.site.pair()),
        [("grpc.ssl_target_name_override", federation.site.server_name)],
    )
    yield channel
    await channel.close()


async def say(channel: grpc.aio.Channel, method: str, frames: list[bytes], *, known: bool = True) -> str:
    """Send frames to a method; return the name of the error that comes back, or nothing."""
    call = channel.stream_stream(protocol.path_of(method))(metadata=protocol.METADATA if known else None)
    try:
        for data in frames:
            await call.write(data)
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except asyncio.InvalidStateError:
        await call.code()
    except grpc.aio.AioRpcError:
        pass
    for name, value in await call.trailing_metadata() or ():
        if name == protocol.PROBLEM_KEY:
            return type(protocol.raised(value)).__name__
    return (await call.code()).name


METHODS = [*(kind.__name__ for kind in messages.CALLS), "Attend", "Follow"]


@pytest.mark.parametrize("method", METHODS)
async def test_another_protocol_is_told(raw: grpc.aio.Channel, depot: Depot, method: str) -> None:
    for _ in range(5):  # gRPC may see the stream's end before the trailers that came with it; a Connection tries again
        told = await say(raw, method, [b"\x80"], known=False)
        if told != "INTERNAL":
            break
    assert told == "VersionError"
    assert depot.calls == []


async def test_a_method_that_is_not_there(raw: grpc.aio.Channel, dial: Dial) -> None:
    assert await say(raw, "Explode", [b""]) == "UNIMPLEMENTED"

    class Explode(messages.Message):
        reply = messages.Done

    async with dial() as connection:
        with pytest.raises(VersionError):
            await connection.call(Explode())  # type: ignore[call-overload]


async def test_a_message_that_is_too_long(raw: grpc.aio.Channel, dial: Dial) -> None:
    assert await say(raw, "Answer", [bytes(protocol.MAX_MESSAGE_BYTES + 1)]) == "RESOURCE_EXHAUSTED"
    async with dial() as connection:
        with pytest.raises(WireError):
            await connection.call(messages.Answer("j", "t", inline=bytes(protocol.MAX_MESSAGE_BYTES)))


bytes_or_nearly = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=8,
    ).map(msgspec.msgpack.encode),
)


@given(st.sampled_from([*messages.CALLS, Attend, Follow, messages.Get, messages.Offer]), bytes_or_nearly)
@settings(max_examples=500)
def test_any_bytes_are_a_message_or_an_error(kind: type[messages.Message], data: bytes) -> None:
    try:
        message = protocol.decode(kind, data)
    except WireError:
        return
    assert type(message) is kind


async def test_the_server_survives_any_bytes(
    raw: grpc.aio.Channel, depot: Depot, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    depot.bell.put_nowait(1)
    outcomes: set[str] = set()

    @given(st.sampled_from([name for name in METHODS if name != "Attend"]), st.lists(bytes_or_nearly, max_size=3))
    @settings(max_examples=300)
    def collect(method: str, frames: list[bytes]) -> None:
        cases.append((method, frames))

    cases: list[tuple[str, list[bytes]]] = []
    await asyncio.to_thread(collect)
    for method, frames in cases:
        outcomes.add(await say(raw, method, frames))
    assert "WireError" in outcomes
    assert outcomes <= {"WireError", "OK", "JobError", "UNIMPLEMENTED", "INTERNAL", "CANCELLED", "UNKNOWN"}, outcomes
    assert not [record for record in caplog.records if record.exc_info], "nothing of this is a defect"
    async with dial() as connection:
        await connection.call(messages.ListJobs())


async def test_the_audit_hears_where_a_caller_is(
    federation: Federation, server: Server, dial: Dial, depot: Depot, tmp_path: Path
) -> None:
    """Not at the loopback's address, by which gRPC knows all who come in by the door."""
    peers: set[tuple[str, str]] = set()

    async def refused(peer: str, action: str, error: HansaError) -> None:
        peers.add((peer, action))

    depot.refused = refused  # type: ignore[method-assign]
    revoked = federation.kit(Role.SITE, "narva")
    federation.authority.revoke("site/narva", "its key was copied")
    federation.tell(federation.server)
    (tmp_path / "file").write_bytes(b"x")
    async with (
        relay(server.port, local="127.0.0.2") as network,
        dial(revoked, network.port, patience_s=0) as connection,
    ):
        with pytest.raises(AccessError):
            await connection.call(messages.ListJobs())
        with pytest.raises(AccessError):
            await connection.upload("j", "t", tmp_path / "file", describe(tmp_path / "file"))
    assert peers == {("ipv4:127.0.0.2", "ListJobs"), ("ipv4:127.0.0.2", "Upload")}
