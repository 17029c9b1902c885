# SPDX-License-Identifier: Apache-2.0
"""A whole federation in one go, for a laboratory: everybody's keys are made on one machine.

Between organisations, each makes its own key (`hansa pki request`), and this is not the way.

========================  =====================================================================
a folder that has files   StorageError: it is left as it is
a name that comes twice   JobError, nothing is written
a crash on the way        no folder, or (power failure) one that begins with a dot, of no use
========================  =====================================================================
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hansa.core.storage import publish
from hansa.errors import JobError, StorageError
from hansa.pki import keys
from hansa.pki.authority import Authority
from hansa.pki.identity import NAME, Role
from hansa.pki.kit import Kit

DEFAULT_PORT = 8470


@dataclass(frozen=True)
class Federation:
    """Where everything lies.

    Attributes:
        directory: the folder of it all.
        address: HOST:PORT of the server.
        authority: the authority's folder.
        server: the server's kit, with server.toml.
        sites: name -> kit, with site.toml.
        users: name -> kit, with client.toml.
    """

    directory: Path
    address: str
    authority: Path
    server: Path
    sites: Mapping[str, Path]
    users: Mapping[str, Path]


def provision(
    directory: Path,
    federation: str,
    server: str,
    sites: Sequence[str],
    leads: Sequence[str],
    *,
    observers: Sequence[str] = (),
    admins: Mapping[str, str] | None = None,
    server_settings: str = "",
    site_settings: str = "",
) -> Federation:
    """Make authority, server, sites and people.

    Args:
        directory: the folder to make.
        federation: its name, a DNS label.
        server: HOST or HOST:PORT at which sites reach the server; an IPv6 address stands in brackets.
        sites: the sites' names.
        leads: names of those who may submit jobs.
        observers: names of those who may watch.
        admins: name of a site's admin -> the site.
        server_settings: TOML to stand below ``listen`` in server.toml.
        site_settings: TOML to stand below ``server`` in every site.toml.

    Raises:
        JobError: a name or address that can't be, or one that comes twice.
        StorageError: the folder is not empty or can't be written.
    """
    host, port = split_address(server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    admins = admins or {}
    people = [
        *((name, Role.LEAD, None) for name in leads),
        *((name, Role.OBSERVER, None) for name in observers),
        *((name, Role.ADMIN, site) for name, site in admins.items()),
    ]
    _check_names(sites, [name for name, _, _ in people], admins)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise StorageError(f"{directory} is there already and is left as it is. Choose another folder.")
    directory = directory.absolute()
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        authority = Authority.create(temporary / "authority", federation)
        kits = [authority.issue(temporary / "server", Role.SERVER, "server", hosts=[host])]
        _write_settings(kits[0], "server.toml", SERVER_TOML, f"{_interface(host)}:{port}", server_settings)
        for name in sites:
            kits.append(authority.issue(temporary / "sites" / name, Role.SITE, name))
            _write_settings(kits[-1], "site.toml", SITE_TOML, address, site_settings)
        for name, role, site in people:
            kits.append(authority.issue(temporary / "users" / name, role, name, site=site))
            _write_settings(kits[-1], "client.toml", CLIENT_TOML, address)
        newest = authority.roster.data
        for kit in kits:
            kit.update_roster(newest)
        publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Federation(
        directory,
        address,
        directory / "authority",
        directory / "server",
        {name: directory / "sites" / name for name in sites},
        {name: directory / "users" / name for name, _, _ in people},
    )


def _check_names(sites: Sequence[str], people: Sequence[str], admins: Mapping[str, str]) -> None:
    for names in (sites, people):
        counts = Counter(name.casefold() for name in names)  # a folder each, where Ana and ana may be the same one
        if twice := next((name for name, count in counts.items() if count > 1), None):
            raise JobError(f"The name {twice} comes twice. Give each site, and each person, a name of its own.")
        for name in names:
            if not NAME.fullmatch(name):  # before it becomes part of a path
                raise JobError(
                    f"{name[:100]!r} can't be a name: use up to 100 letters, digits, dots, dashes and underscores, "
                    "a letter or digit first."
                )
    for name, site in admins.items():
        if site not in sites:
            raise JobError(f"{name} can't be the admin of {site!r}: there is no such site.")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST``, ``HOST:PORT``, ``[IPV6]`` or ``[IPV6]:PORT``.

    Raises:
        JobError: it is none of these.

    >>> split_address("fl.example.org"), split_address("[::1]:9000")
    (('fl.example.org', 8470), ('::1', 9000))
    """
    match = _ADDRESS.fullmatch(address)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if not match or not 0 < port < 65536:
        raise JobError(f"{address[:100]!r} is no address of a server. Write HOST or HOST:PORT.")
    return match["v6"] or match["host"], port


_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+))(?::(?P<port>[0-9]{1,5}))?")


def _interface(host: str) -> str:
    """Return the address to listen at: loopback stays on this machine, anything else is reached from outside."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "0.0.0.0"
    if address.is_loopback:
        return str(address) if address.version == 4 else f"[{address}]"
    return "0.0.0.0" if address.version == 4 else "[::]"


def _write_settings(kit: Kit, name: str, text: str, address: str, more: str = "") -> None:
    keys.write(kit.directory / name, (text.format(json.dumps(address)) + (f"\n{more}" if more else "")).encode())


SERVER_TOML = """\
# The federation's server: `hansa server start` in this folder.
# key.pem beside this file is its private key: back it up, and let nobody else read it.

# HOST:PORT to listen at. Sites and people dial in here; the server dials nobody.
listen = {}
"""

SITE_TOML = """\
# This site: `hansa site start` in this folder. It dials out; nothing dials in.
# key.pem beside this file is its private key: back it up, and let nobody else read it.

# HOST:PORT of the federation's server.
server = {}
"""

CLIENT_TOML = """\
# For `hansa job` and `hansa sites`.
# key.pem beside this file is your private key: let nobody else read it.

# HOST:PORT of the federation's server.
server = {}
"""
