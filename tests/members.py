# SPDX-License-Identifier: Apache-2.0
"""A federation with everybody in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.pki.kit import Kit


@dataclass(frozen=True)
class Members:
    authority: Authority
    server: Kit
    site: Kit
    lead: Kit
    admin: Kit
    observer: Kit


def members(folder: Path, federation: str = "lab") -> Members:
    authority = Authority.create(folder / "authority", federation)
    kits = {
        "server": authority.issue(folder / "server", Role.SERVER, "main", hosts=["localhost", "127.0.0.1"]),
        "site": authority.issue(folder / "site", Role.SITE, "hospital-a"),
        "lead": authority.issue(folder / "lead", Role.LEAD, "ana"),
        "admin": authority.issue(folder / "admin", Role.ADMIN, "bo", site="hospital-a"),
        "observer": authority.issue(folder / "observer", Role.OBSERVER, "cy"),
    }
    for kit in kits.values():
        kit.update_roster(authority.roster.data)
    return Members(authority, **kits)
