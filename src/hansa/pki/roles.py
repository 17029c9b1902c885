# SPDX-License-Identifier: Apache-2.0
"""What each role may do: one table, which docs/roles.md shows and every check reads.

A scope in a credential takes away what it does not name; it never adds. Nobody acts for a site but that site.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from types import MappingProxyType

from hansa.errors import AccessError
from hansa.pki.identity import Identity, Role


class Permission(StrEnum):
    """Something that a call may ask for; its value is the name of a scope."""

    ATTEND = "attend"
    SUBMIT = "submit"
    LIST = "list"
    SHOW = "show"
    LOGS = "logs"
    DOWNLOAD = "download"
    ABORT = "abort"
    WITHDRAW = "withdraw"
    RESUME = "resume"
    DELETE = "delete"
    SITES = "sites"


class Reach(StrEnum):
    """How far a permission goes."""

    ANY = "any"
    OWN = "own"
    SITE = "own site"


MEANINGS: Mapping[Permission, str] = MappingProxyType(
    {
        Permission.ATTEND: "take part as a site: fetch plans and models, send updates",
        Permission.SUBMIT: "submit a job",
        Permission.LIST: "list jobs",
        Permission.SHOW: "show a job: its settings, rounds and metrics",
        Permission.LOGS: "follow a job's log",
        Permission.DOWNLOAD: "download a job's results, its model included",
        Permission.ABORT: "abort a job",
        Permission.WITHDRAW: "end a job's work at a site, which leaves the job",
        Permission.RESUME: "resume a job",
        Permission.DELETE: "delete a job with its results",
        Permission.SITES: "see sites: which are there, and how they are",
    }
)

_SEE = (Permission.LIST, Permission.SHOW, Permission.LOGS)

TABLE: Mapping[Role, Mapping[Permission, Reach]] = MappingProxyType(
    {
        Role.SERVER: MappingProxyType({}),
        Role.SITE: MappingProxyType({Permission.ATTEND: Reach.SITE, Permission.WITHDRAW: Reach.SITE}),
        Role.LEAD: MappingProxyType(
            {
                Permission.SUBMIT: Reach.ANY,
                **dict.fromkeys(_SEE, Reach.ANY),
                Permission.DOWNLOAD: Reach.OWN,
                Permission.ABORT: Reach.ANY,
                Permission.RESUME: Reach.OWN,
                Permission.DELETE: Reach.OWN,
                Permission.SITES: Reach.ANY,
            }
        ),
        Role.ADMIN: MappingProxyType(
            {**dict.fromkeys(_SEE, Reach.SITE), Permission.WITHDRAW: Reach.SITE, Permission.SITES: Reach.SITE}
        ),
        Role.OBSERVER: MappingProxyType({**dict.fromkeys(_SEE, Reach.ANY), Permission.SITES: Reach.ANY}),
    }
)
"""Role -> what it may do -> how far that goes. What is not here is refused."""


def reach(identity: Identity, permission: Permission) -> Reach | None:
    """Return how far a permission goes for somebody, or None where it is not given at all."""
    if identity.scopes and permission.value not in identity.scopes:
        return None
    return TABLE[identity.role].get(permission)


def allowed(
    identity: Identity, permission: Permission, *, owner: str | None = None, sites: Collection[str] = ()
) -> None:
    """Return if somebody may do this, and raise otherwise.

    Args:
        identity: who asks, as `Roster.admit` returned it.
        permission: what for.
        owner: the name of the lead who submitted the job in question, where there is one.
        sites: the sites in question: the one that is acted for, or those that take part in the job.

    Raises:
        AccessError: no.
    """
    far = reach(identity, permission)
    if far is None:
        if TABLE[identity.role].get(permission):
            given = ", ".join(sorted(identity.scopes))
            raise AccessError(
                f"This credential of {identity.member} is for {given} alone, not to {permission}. Ask the federation's "
                "authority for one with that scope."
            )
        roles = " or ".join(role for role in Role if permission in TABLE[role])
        raise AccessError(
            f"{identity.member} may not {_plain(permission)}: that needs the role {roles}. "
            "`hansa pki show` says what a certificate allows."
        )
    if far is Reach.OWN and (owner is None or owner != identity.name):
        raise AccessError(f"{identity.member} may not {_plain(permission)} that {owner or 'somebody else'} submitted.")
    if far is Reach.SITE and (identity.at_site is None or identity.at_site not in sites):
        raise AccessError(f"{identity.member} may {_plain(permission)} for site {identity.at_site} alone.")


def _plain(permission: Permission) -> str:
    return MEANINGS[permission].partition(":")[0].partition(",")[0]


_MARKS = {None: "", Reach.ANY: "yes", Reach.OWN: "own jobs", Reach.SITE: "own site"}


def markdown() -> str:
    """Return the table as markdown: docs/roles.md holds it, and a test holds the two together."""
    lines = [
        f"| may | scope | {' | '.join(Role)} |",
        "|---|---|" + "---|" * len(Role),
        *(
            f"| {MEANINGS[permission]} | `{permission}` | "
            + " | ".join(_MARKS[TABLE[role].get(permission)] for role in Role)
            + " |"
            for permission in Permission
        ),
    ]
    return "\n".join(lines) + "\n"
