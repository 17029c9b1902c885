# SPDX-License-Identifier: Apache-2.0
"""People for a lab, beside the lead that each lab has."""

from __future__ import annotations

from pathlib import Path

from hansa.lab import Lab
from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.pki.kit import Kit


def person(lab: Lab, role: Role, name: str, site: str | None = None) -> Path:
    """Give somebody a kit, and the server the roster that names them; return the kit's folder."""
    authority = Authority(lab.directory / "authority")
    kit = authority.issue(lab.directory / "users" / name, role, name, site=site)
    (kit.directory / "client.toml").write_text(f'server = "{lab.address}"\n')
    Kit(lab.folder("server")).update_roster(authority.roster.data)
    return kit.directory
