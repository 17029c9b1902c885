# SPDX-License-Identifier: Apache-2.0
"""What ``hansa pki`` and ``hansa provision`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hansa.cli import console
from hansa.errors import AccessError, HansaError, JobError, nearest
from hansa.pki import keys, kit
from hansa.pki import provision as laboratory
from hansa.pki.authority import Authority
from hansa.pki.identity import Claim, Identity, Role, identity_of, now, read_certificate, read_root
from hansa.pki.kit import Kit
from hansa.pki.request import read_reply, read_request
from hansa.pki.roles import MEANINGS, reach
from hansa.pki.roster import Roster
from hansa.server.settings import commented
from hansa.site.settings import commented as settings_of_sites


@dataclass(frozen=True)
class Terms:
    """What an authority's operator gives somebody; as `Authority.sign`, with the words of the command line."""

    role: str | None
    name: str | None
    site: str | None
    scopes: Sequence[str]
    hosts: Sequence[str]
    days: float | None
    hours: float | None
    another_key: bool

    def who(self) -> tuple[Role, str]:
        """Return role and name, or raise JobError."""
        if self.role is None or self.name is None:
            raise JobError("Give the --role and --name that you mean to sign for, or --renewal.")
        return _role(self.role), self.name

    def rest(self) -> dict[str, Any]:
        """Return the other arguments of `Authority.sign`."""
        return {
            "site": self.site,
            "scopes": self.scopes,
            "hosts": self.hosts,
            "lifetime": _lifetime(self.days, self.hours),
            "another_key": self.another_key,
        }


def _role(word: str) -> Role:
    try:
        return Role(word)
    except ValueError:
        raise JobError(
            f"There is no role {word!r}; there are {', '.join(Role)}.{nearest(word, [role.value for role in Role])}"
        ) from None


def _lifetime(days: float | None, hours: float | None) -> timedelta | None:
    if days is None and hours is None:
        return None
    try:
        return timedelta(days=days or 0, hours=hours or 0)
    except (OverflowError, ValueError) as error:
        raise JobError("This is no number of days or hours that a certificate can count.") from error


def init(directory: Path, federation: str, *, as_json: bool) -> None:
    """Make a federation."""
    authority = Authority.create(directory, federation)
    root = read_root(authority.certificate_pem)
    document = {"authority": str(directory.absolute()), "federation": federation, "fingerprint": root.fingerprint}
    _tell(
        document,
        f"Made the federation {federation} in {directory}. Its key.pem signs everything: back it up, and keep it from "
        f"everybody.\nTell sites the fingerprint, by another way than files go: {_grouped(root.fingerprint)}",
        as_json=as_json,
    )


def request(directory: Path, federation: str, role: str, name: str, site: str | None, *, as_json: bool) -> None:
    """Make a key and a request."""
    claim = Claim.of(federation, _role(role), name, site)
    kit.request(directory, claim)
    path = directory / kit.REQUEST
    document = {"request": str(path.absolute()), **_claimed(claim)}
    _tell(
        document,
        f"Wrote {path}. Send it to the authority of {federation}, and then: hansa pki install REPLY --dir {directory}\n"
        f"The key stays in {directory / kit.KEY}.",
        as_json=as_json,
    )


def sign(file: Path, out: Path, folder: Path, terms: Terms, *, renewal: bool, as_json: bool) -> None:
    """Sign a request and write the reply."""
    authority = Authority.open(folder)
    request_pem = keys.read(file)
    if renewal:
        if terms != Terms(None, None, None, [], [], None, None, False):
            raise JobError("--renewal signs the same again; leave the other options out.")
        pem = authority.renew(request_pem)
    else:
        role, name = terms.who()
        pem = authority.sign(request_pem, role, name, **terms.rest())
    keys.write(out, authority.reply(pem).write(), replace=True)
    who = identity_of(pem)
    document = {"reply": str(out.absolute()), "roster": authority.roster.version, **_known(who)}
    _tell(
        document,
        f"Signed {who.member} until {_date(who.expires)}. Send {out} back; bring the new roster, which is in it, to "
        f"the server too: hansa pki roster --out roster.json",
        as_json=as_json,
    )


def install(file: Path, directory: Path, fingerprint: str | None, *, as_json: bool) -> None:
    """Install a reply."""
    pinned = (directory / kit.AUTHORITY).exists()
    made = Kit.install(directory, read_reply(keys.read(file)), authority=fingerprint)
    root = read_root(made.authority_pem())
    document = {"kit": str(directory.absolute()), "fingerprint": root.fingerprint, **_known(made.identity)}
    words = f"{directory} is the kit of {made.identity.member} until {_date(made.identity.expires)}."
    if fingerprint is None and not pinned:
        words += f"\nCompare the authority's fingerprint with its operator: {_grouped(root.fingerprint)}"
    _tell(document, words, as_json=as_json)


def issue(directory: Path, folder: Path, terms: Terms, *, as_json: bool) -> None:
    """Make a whole kit."""
    authority = Authority.open(folder)
    role, name = terms.who()
    made = authority.issue(directory, role, name, **terms.rest())
    document = {"kit": str(directory.absolute()), "roster": made.roster().version, **_known(made.identity)}
    _tell(
        document,
        f"{directory} is the kit of {made.identity.member} until {_date(made.identity.expires)}.",
        as_json=as_json,
    )


def renew(directory: Path, *, new_key: bool, as_json: bool) -> None:
    """Make the request for the next certificate."""
    held = Kit(directory)
    held.renewal(new_key=new_key)
    path = directory / kit.REQUEST
    document = {"request": str(path.absolute()), "new_key": new_key, **_claimed(held.identity)}
    who = held.identity
    role, site = who.role, f" --site {who.site}" if who.site else ""
    how = f"--role {role} --name {who.name}{site} --another-key" if new_key else "--renewal"
    _tell(document, f"Wrote {path}. The authority signs it with: hansa pki sign {path.name} {how}", as_json=as_json)


def revoke(who: str, reason: str, folder: Path, *, as_json: bool) -> None:
    """Revoke."""
    authority = Authority.open(folder)
    before = authority.roster
    after = authority.revoke(who, reason)
    gone = {serial: item.member for serial, item in after.revoked.items() if serial not in before.revoked}
    renamed = after.server_name != before.server_name
    document = {"revoked": gone, "roster": after.version, "server_name": after.server_name, "renew_servers": renamed}
    words = [f"Revoked the certificate {serial} of {member}." for serial, member in gone.items()]
    words.append(f"Bring the roster, now version {after.version}, to the server: hansa pki roster --out roster.json")
    if renamed:
        words.append(
            f"Servers now have the name {after.server_name}: sites that know the new roster refuse the old "
            "certificates, so every server needs a new one."
        )
    _tell(document, "\n".join(words), as_json=as_json)


def roster(out: Path, folder: Path, above: int | None, *, as_json: bool) -> None:
    """Write the newest roster."""
    authority = Authority.open(folder)
    newest = authority.roster if above is None else authority.refresh(above)
    keys.write(out, newest.data, replace=True)
    document = {"file": str(out.absolute()), "federation": newest.federation, "roster": newest.version}
    _tell(document, f"Wrote version {newest.version} of the roster of {newest.federation} to {out}.", as_json=as_json)


def take(file: Path, directory: Path, *, as_json: bool) -> None:
    """Put a roster into a kit."""
    held = Kit(directory)
    news = held.update_roster(keys.read(file))
    version = held.roster().version
    words = f"{directory} now has version {version}." if news else f"{directory} has version {version} already."
    _tell({"kit": str(directory.absolute()), "roster": version, "news": news}, words, as_json=as_json)


def provision(
    directory: Path,
    federation: str,
    server: str,
    sites: Sequence[str],
    leads: Sequence[str],
    observers: Sequence[str],
    admins: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Make a whole federation."""
    of_sites: dict[str, str] = {}
    for word in admins:
        site, slash, name = word.partition("/")
        if not slash or name in of_sites:
            raise JobError(f"--admin {word}: write SITE/NAME, each name once.")
        of_sites[name] = site
    made = laboratory.provision(
        directory,
        federation,
        server,
        sites,
        leads,
        observers=observers,
        admins=of_sites,
        server_settings=commented(),
        site_settings=settings_of_sites(),
    )
    document = {
        "federation": federation,
        "address": made.address,
        "authority": str(made.authority),
        "server": str(made.server),
        "sites": {name: str(path) for name, path in made.sites.items()},
        "users": {name: str(path) for name, path in made.users.items()},
    }
    lines = [f"Made the federation {federation}, whose server is reached at {made.address}."]
    lines += [f"  {path}" for path in (made.authority, made.server, *made.sites.values(), *made.users.values())]
    lines.append("Whoever has such a folder is who it says: copy each to its own machine, and keep authority apart.")
    _tell(document, "\n".join(lines), as_json=as_json)


def show(path: Path, authority: Path | None, *, as_json: bool) -> None:
    """Say what something is."""
    document = _explain_folder(path) if path.is_dir() else _explain_file(path, authority)
    if as_json:
        console.emit(document)
        return
    to = console.out()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in document.items():
        if not isinstance(value, list) or key == "scopes":
            facts.add_row(Text(key.replace("_", " "), "dim"), Text(_word(value)))
    to.print(facts)
    for title in ("members", "revoked"):
        if rows := document.get(title, []):
            table = Table(box=box.SIMPLE, header_style="dim", title=title)
            for column in rows[0]:
                table.add_column(column, overflow="fold", no_wrap=column in ("expires", "at", "state"))
            for row in rows:
                table.add_row(*(Text(_word(value)) for value in row.values()))
            to.print(table)


def _explain_folder(path: Path) -> dict[str, Any]:
    if (path / kit.AUTHORITY).exists():
        held = Kit(path)
        roster = held.roster()
        return {
            "kind": "kit",
            **_about(held.certificate_pem()),
            **_standing(held.certificate_pem(), roster),
            "roster": roster.version,
            "roster_issued": roster.issued,
            "server_name": roster.server_name,
            "authority_fingerprint": read_root(held.authority_pem()).fingerprint,
        }
    if (path / kit.REQUEST).exists():
        return _explain_file(path / kit.REQUEST, None)
    there = Authority.open(path)
    return {
        "kind": "authority",
        **_about_root(there.certificate_pem),
        **_about_roster(there.roster),
    }


def _explain_file(path: Path, authority: Path | None) -> dict[str, Any]:
    data = keys.read(path)
    if b"PRIVATE KEY-----" in data:
        raise AccessError(f"{path} is a private key. It is shown to nobody.")
    if b"CERTIFICATE REQUEST-----" in data:
        return {"kind": "request", **_claimed(read_request(data).claim)}
    if data.lstrip().startswith(b"{"):
        if b'"certificate"' in data:
            reply = read_reply(data)
            return {
                "kind": "reply",
                **_about(reply.certificate.encode()),
                "authority_fingerprint": read_root(reply.authority.encode()).fingerprint,
            }
        return {"kind": "roster", **_about_roster(Roster.read(data, _root_for(path, authority)))}
    try:
        return {"kind": "authority's certificate", **_about_root(data)}
    except AccessError:
        return {"kind": "certificate", **_about(data)}


def _root_for(path: Path, authority: Path | None) -> bytes:
    """Return the authority's certificate that a roster is checked with."""
    if authority:
        return keys.read(authority)
    for name in (kit.AUTHORITY, kit.CERTIFICATE):
        if (path.parent / name).exists():
            return keys.read(path.parent / name)
    raise JobError(f"To check {path}, name the authority's certificate: --authority authority.pem")


def _about(certificate_pem: bytes) -> dict[str, Any]:
    certificate = read_certificate(certificate_pem)
    who = certificate.identity
    may = {permission.value: far.value for permission in MEANINGS if (far := reach(who, permission))}
    return {
        **_known(who),
        "starts": certificate.starts,
        "fingerprint": certificate.fingerprint,
        "may": may,
    }


def _standing(certificate_pem: bytes, roster: Roster) -> dict[str, Any]:
    """Say whether a certificate counts, and why not."""
    try:
        roster.admit(certificate_pem)
    except HansaError as error:
        return {"counts": False, "reason": str(error)}
    return {"counts": True}


def _about_root(pem: bytes) -> dict[str, Any]:
    root = read_root(pem)
    return {
        "federation": root.federation,
        "fingerprint": root.fingerprint,
        "expires": root.raw.not_valid_after_utc,
    }


def _about_roster(roster: Roster) -> dict[str, Any]:
    return {
        "federation": roster.federation,
        "roster": roster.version,
        "issued": roster.issued,
        "server_name": roster.server_name,
        "members": [
            {
                "member": member,
                "serial": entry.serial,
                "expires": entry.expires,
                "state": "counts" if entry.expires >= now() else "expired",
            }
            for member, entries in sorted(roster.members.items())
            for entry in entries
        ],
        "revoked": [
            {"member": item.member, "serial": serial, "at": item.at, "reason": item.reason}
            for serial, item in sorted(roster.revoked.items())
        ],
    }


def _claimed(claim: Claim) -> dict[str, Any]:
    said = {"federation": claim.federation, "role": claim.role.value, "name": claim.name}
    if claim.site:
        said["site"] = claim.site
    return said


def _known(who: Identity) -> dict[str, Any]:
    return {
        **_claimed(who),
        "scopes": sorted(who.scopes),
        "serial": f"{who.serial:x}",
        "expires": who.expires,
    }


def _word(value: Any) -> str:
    """Return one value of a document for people."""
    if isinstance(value, Mapping):
        return ", ".join(word if far == "any" else f"{word} ({far})" for word, far in value.items()) or "nothing"
    if isinstance(value, list):
        return ", ".join(value) or "all of the role"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return _date(value)
    return str(value)


def _date(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _grouped(fingerprint: str) -> str:
    return ":".join(fingerprint[i : i + 4] for i in range(0, len(fingerprint), 4))


def _tell(document: Any, words: str, *, as_json: bool) -> None:
    if as_json:
        console.emit(document)
    else:
        console.out().print(Text(words), soft_wrap=True)
