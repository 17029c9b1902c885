# SPDX-License-Identifier: Apache-2.0
"""Who may do what: the table in the code is the one in the docs, and no role reaches further than its sentence says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import AccessError
from hansa.pki.identity import Identity, Role, now
from hansa.pki.roles import MEANINGS, TABLE, Permission, Reach, allowed, markdown, reach

DOCUMENT = Path(__file__).parents[2] / "docs" / "roles.md"

NAMES = st.sampled_from(["ana", "bo", "hospital-a", "hospital-b"])
IDENTITIES = st.builds(
    lambda role, name, site, scopes: Identity(
        "lab", role, name, site if role is Role.ADMIN else None, frozenset(scopes), serial=1, expires=now()
    ),
    st.sampled_from(Role),
    NAMES,
    NAMES,
    st.sets(st.sampled_from([permission.value for permission in Permission])),
)


def may(identity: Identity, permission: Permission, owner: str | None = None, sites: tuple[str, ...] = ()) -> bool:
    try:
        allowed(identity, permission, owner=owner, sites=sites)
    except AccessError:
        return False
    return True


def someone(role: Role, name: str = "x", *scopes: str) -> Identity:
    site = "hospital-a" if role is Role.ADMIN else None
    return Identity("lab", role, name, site, frozenset(scopes), serial=1, expires=now())


def test_the_table_in_the_documentation_is_the_one_in_the_code() -> None:
    assert markdown() in DOCUMENT.read_text()
    assert set(MEANINGS) == set(Permission)
    assert set(TABLE) == set(Role)


@given(IDENTITIES, st.sampled_from(Permission), NAMES | st.none(), st.lists(NAMES, max_size=3).map(tuple))
def test_nobody_reaches_beyond_his_role(
    who: Identity, permission: Permission, owner: str | None, sites: tuple[str, ...]
) -> None:
    yes = may(who, permission, owner, sites)
    if yes and who.scopes:
        assert permission in who.scopes
    if permission is Permission.ATTEND:
        assert not yes or (who.role is Role.SITE and who.name in sites)
    if permission is Permission.SUBMIT:
        assert not yes or who.role is Role.LEAD
    if permission in (Permission.DOWNLOAD, Permission.RESUME, Permission.DELETE):
        assert not yes or (who.role is Role.LEAD and owner == who.name)
    if permission is Permission.ABORT:
        assert not yes or who.role is Role.LEAD
    if permission is Permission.WITHDRAW:
        own = who.name if who.role is Role.SITE else who.site
        assert not yes or (who.role in (Role.SITE, Role.ADMIN) and own in sites)
    if who.role is Role.ADMIN:
        assert not yes or who.site in sites
    if who.role is Role.SERVER:
        assert not yes


@given(IDENTITIES, st.sampled_from(Permission), NAMES | st.none(), st.lists(NAMES, max_size=3).map(tuple))
def test_a_scope_only_takes_away(
    who: Identity, permission: Permission, owner: str | None, sites: tuple[str, ...]
) -> None:
    whole = Identity("lab", who.role, who.name, who.site, serial=1, expires=who.expires)
    if may(who, permission, owner, sites):
        assert may(whole, permission, owner, sites)
    elif may(whole, permission, owner, sites):
        assert who.scopes
        assert permission not in who.scopes


@pytest.mark.parametrize(
    ("who", "permission", "owner", "sites", "expected"),
    [
        (someone(Role.LEAD, "ana"), Permission.SUBMIT, None, (), True),
        (someone(Role.LEAD, "ana"), Permission.DOWNLOAD, "ana", (), True),
        (someone(Role.LEAD, "ana"), Permission.DOWNLOAD, "bo", (), False),
        (someone(Role.LEAD, "ana"), Permission.DOWNLOAD, None, (), False),
        (someone(Role.LEAD, "ana"), Permission.ABORT, "bo", (), True),
        (someone(Role.LEAD, "ana", "submit"), Permission.SUBMIT, None, (), True),
        (someone(Role.LEAD, "ana", "submit"), Permission.LIST, None, (), False),
        (someone(Role.OBSERVER), Permission.SHOW, "ana", (), True),
        (someone(Role.OBSERVER), Permission.DOWNLOAD, "x", (), False),
        (someone(Role.OBSERVER), Permission.SUBMIT, None, (), False),
        (someone(Role.ADMIN), Permission.SHOW, "ana", ("hospital-a", "hospital-b"), True),
        (someone(Role.ADMIN), Permission.SHOW, "ana", ("hospital-b",), False),
        (someone(Role.ADMIN), Permission.WITHDRAW, "ana", ("hospital-a",), True),
        (someone(Role.ADMIN, "hospital-b"), Permission.WITHDRAW, "ana", ("hospital-b",), False),
        (someone(Role.ADMIN), Permission.ABORT, "ana", ("hospital-a",), False),
        (someone(Role.SITE, "hospital-a"), Permission.ATTEND, None, ("hospital-a",), True),
        (someone(Role.SITE, "hospital-a"), Permission.ATTEND, None, ("hospital-b",), False),
        (someone(Role.SITE, "hospital-a"), Permission.SUBMIT, None, (), False),
    ],
)
def test_cases(
    who: Identity, permission: Permission, owner: str | None, sites: tuple[str, ...], expected: bool
) -> None:
    assert may(who, permission, owner, sites) is expected


@pytest.mark.parametrize(
    ("who", "permission", "message"),
    [
        (someone(Role.OBSERVER, "cy"), Permission.SUBMIT, "observer/cy may not submit a job: that needs the role lead"),
        (someone(Role.LEAD, "ana", "submit"), Permission.LIST, "is for submit alone, not to list"),
        (someone(Role.LEAD, "ana"), Permission.DELETE, "that bo submitted"),
        (someone(Role.ADMIN, "bo"), Permission.SHOW, "for site hospital-a alone"),
    ],
)
def test_a_refusal_says_why(who: Identity, permission: Permission, message: str) -> None:
    with pytest.raises(AccessError, match=message):
        allowed(who, permission, owner="bo")


def test_reach() -> None:
    assert reach(someone(Role.LEAD), Permission.LIST) is Reach.ANY
    assert reach(someone(Role.ADMIN), Permission.LIST) is Reach.SITE
    assert reach(someone(Role.SITE), Permission.LIST) is None
    assert reach(someone(Role.LEAD, "x", "submit"), Permission.LIST) is None
