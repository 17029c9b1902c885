# SPDX-License-Identifier: Apache-2.0
"""Why there is no connection, told by trying once more in plain steps: gRPC does not say.

Name, proxy, TCP, TLS, certificates: the first step that fails is the cause.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.request
from urllib.parse import urlsplit

from hansa.errors import AccessError, HansaError, UnreachableError
from hansa.pki.kit import CERTIFICATE, Kit

STEP_S = 10.0

_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, 62  # X509_V_ERR_*, of OpenSSL's x509_vfy.h


def proxy_for(address: str, proxy: str | None) -> str | None:
    """Return the proxy to tunnel through: the one named, or what the environment says of this address."""
    if proxy is not None:
        return proxy or None
    host, _ = split(address)
    if urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies_environment().get("https")


def split(address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        UnreachableError: this is no ``HOST:PORT``.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise UnreachableError(f"{address!r} is no address. Write HOST:PORT.")
    return host, port


async def diagnose(kit: Kit, address: str, proxy: str | None, otherwise: str, step_s: float = STEP_S) -> HansaError:
    """Return the error that says why ``address`` can't be reached; ``otherwise`` is said if now it can.

    Each step may take ``step_s`` seconds.
    """
    try:
        kit.roster().admit(kit.certificate_pem())
        connection = await reach(address, proxy, step_s)
        try:
            await _greeted(kit, connection, address, step_s)
        finally:
            connection.close()
    except HansaError as error:
        return error
    return UnreachableError(f"Can't reach {address}: {otherwise}.")


async def reach(address: str, proxy: str | None, step_s: float = STEP_S) -> socket.socket:
    """Return a TCP connection to ``address``, or to a proxy that has made a tunnel there; it does not block.

    Raises:
        UnreachableError: there is none, and why.
    """
    host, port = split(address)
    tunnel = proxy_for(address, proxy)
    connection = await _connected(*(split(urlsplit(tunnel).netloc) if tunnel else (host, port)), tunnel, step_s)
    if tunnel:
        try:
            await _tunnelled(connection, host, port, tunnel, step_s)
        except BaseException:  # let go of the connection; raised again
            connection.close()
            raise
    return connection


async def _connected(host: str, port: int, tunnel: str | None, step_s: float) -> socket.socket:
    what = f"the proxy {tunnel}" if tunnel else f"{host}:{port}"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(step_s):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for last, (family, kind, number, _, target) in enumerate(found, 1 - len(found)):
                connection = socket.socket(family, kind, number)
                connection.setblocking(False)
                try:
                    await loop.sock_connect(connection, target)
                except BaseException as error:  # let go of what was begun; raised again where no address is left
                    connection.close()
                    if not last or not isinstance(error, OSError):
                        raise
                else:
                    return connection
    except socket.gaierror as error:
        raise UnreachableError(
            f"Can't reach {what}: the name {host} has no address ({error.strerror}). Check its spelling, and DNS."
        ) from error
    except ConnectionRefusedError as error:
        raise UnreachableError(f"Can't reach {what}: connection refused. Is it running, on this port?") from error
    except TimeoutError as error:
        raise UnreachableError(
            f"Can't reach {what}: no answer in {step_s:g} s. Does a firewall lie between?"
        ) from error
    except OSError as error:
        raise UnreachableError(f"Can't reach {what}: {error.strerror or error}.") from error
    raise AssertionError("a name has an address, or there is an error")


async def _tunnelled(connection: socket.socket, host: str, port: int, tunnel: str, step_s: float) -> None:
    loop, answer = asyncio.get_running_loop(), b""
    try:
        async with asyncio.timeout(step_s):
            request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
            await loop.sock_sendall(connection, request.encode())
            while not answer.endswith(b"\r\n\r\n"):
                data = await loop.sock_recv(connection, 1 << 12)
                if not data or len(answer) > 1 << 16:
                    raise UnreachableError(f"The proxy {tunnel} did not answer a CONNECT to {host}:{port}.")
                answer += data
    except OSError as error:
        raise UnreachableError(f"The proxy {tunnel} did not answer a CONNECT to {host}:{port}.") from error
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["200"]:
        raise UnreachableError(f"The proxy {tunnel} refused a tunnel to {host}:{port}: {status[:200]}.")


async def _greeted(kit: Kit, connection: socket.socket, address: str, step_s: float) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=kit.authority_pem().decode())
    path = kit.directory / CERTIFICATE
    context.load_cert_chain(path, path.with_name("key.pem"))
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(step_s):
            reader, writer = await asyncio.open_connection(
                sock=connection, ssl=context, server_hostname=kit.server_name
            )
            try:
                await reader.read(1)  # a server that refuses our certificate says so after the handshake (TLS 1.3)
            finally:
                writer.transport.abort()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            raise UnreachableError(
                f"The certificate of the server at {address} has expired. Tell its operator."
            ) from error
        if error.verify_code == _NOT_YET:
            raise UnreachableError(
                f"The certificate of the server at {address} is not valid yet. Compare the clocks of both machines."
            ) from error
        if error.verify_code == _OTHER_NAME:
            raise AccessError(
                f"What answers at {address} has no certificate for {kit.server_name}: it is not this federation's "
                "server, or its certificate was revoked."
            ) from error
        raise AccessError(
            f"What answers at {address} has a certificate that this federation's authority did not sign "
            f"({error.verify_message}). Is it another federation's server, or a proxy that opens TLS?"
        ) from error
    except ssl.SSLError as error:
        raise AccessError(
            f"The server at {address} refused this certificate ({error.reason}). Is it of this server's federation?"
        ) from error
    except TimeoutError as error:
        raise UnreachableError(f"{address} takes connections, but does not speak TLS.") from error
    except OSError as error:
        raise UnreachableError(
            f"{address} ended the connection: {error.strerror or error}. Is it a Hansa server?"
        ) from error
