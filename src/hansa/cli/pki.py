# SPDX-License-Identifier: Apache-2.0
"""``hansa pki`` and ``hansa provision`` as the command line has them; `hansa.cli.certificates` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="pki",
    help="Say who belongs to a federation: certificates, made and signed without a network.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
AuthorityDir = Annotated[Path, typer.Option("--authority", metavar="DIR", help="The authority's folder.")]
KitDir = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The folder with the kit.")]
RoleName = Annotated[str, typer.Option(help="server, site, lead, admin or observer.")]
Name = Annotated[str, typer.Option(help="The site's, server's or person's name.")]
Site = Annotated[str | None, typer.Option(help="The site that an admin is the admin of.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", help="Narrow the credential to this permission, e.g. submit. May be repeated."),
]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="A DNS name or address of a server. May be repeated.")]
Days = Annotated[float | None, typer.Option(help="How long it counts; 365 for programs, 90 for people by default.")]
Hours = Annotated[float | None, typer.Option(help="The same, in hours.")]
AnotherKey = Annotated[bool, typer.Option("--another-key", help="Let a server or site have a second key.")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    federation: Annotated[str, typer.Option(help="The federation's name: small letters, digits, dashes.")],
    as_json: Json = False,
) -> None:
    """Make a federation: its authority's key and certificate."""
    from hansa.cli import certificates

    certificates.init(directory, federation, as_json=as_json)


@app.command()
def request(
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    role: RoleName,
    name: Name,
    directory: KitDir = Path(),
    site: Site = None,
    as_json: Json = False,
) -> None:
    """Make a key, which stays here, and the request to send to the authority."""
    from hansa.cli import certificates

    certificates.request(directory, federation, role, name, site, as_json=as_json)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(metavar="REQUEST", help="The request.pem that somebody sent.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The reply to write, and send back.")],
    authority: AuthorityDir = Path(),
    role: Annotated[str | None, typer.Option(help="The role that you mean to give.")] = None,
    name: Annotated[str | None, typer.Option(help="The name that you mean to give.")] = None,
    site: Site = None,
    scopes: Scopes = None,
    hosts: Hosts = None,
    days: Days = None,
    hours: Hours = None,
    another_key: AnotherKey = False,
    renewal: Annotated[
        bool, typer.Option("--renewal", help="Sign the same again, for the holder of the same key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a request: it must ask for just the role and name that you give."""
    from hansa.cli import certificates

    terms = certificates.Terms(role, name, site, scopes or [], hosts or [], days, hours, another_key)
    certificates.sign(file, out, authority, terms, renewal=renewal, as_json=as_json)


@app.command()
def install(
    file: Annotated[Path, typer.Argument(metavar="REPLY", help="The file that the authority sent back.")],
    directory: KitDir = Path(),
    fingerprint: Annotated[
        str | None,
        typer.Option(help="The authority's fingerprint, as its operator told you by another way."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the authority's reply beside the key that it is for."""
    from hansa.cli import certificates

    certificates.install(file, directory, fingerprint, as_json=as_json)


@app.command()
def issue(
    role: RoleName,
    name: Name,
    directory: KitDir,
    authority: AuthorityDir = Path(),
    site: Site = None,
    scopes: Scopes = None,
    hosts: Hosts = None,
    days: Days = None,
    hours: Hours = None,
    another_key: AnotherKey = False,
    as_json: Json = False,
) -> None:
    """Make a key and a certificate here, and a whole kit of them."""
    from hansa.cli import certificates

    terms = certificates.Terms(role, name, site, scopes or [], hosts or [], days, hours, another_key)
    certificates.issue(directory, authority, terms, as_json=as_json)


@app.command()
def renew(
    directory: KitDir = Path(),
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Change the key too; the old one is used till then.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the request for a kit's next certificate."""
    from hansa.cli import certificates

    certificates.renew(directory, new_key=new_key, as_json=as_json)


@app.command()
def revoke(
    who: Annotated[str, typer.Argument(help="ROLE/NAME, a name, or a certificate's serial number.")],
    reason: Annotated[str, typer.Option(help="Why; whoever is refused will see it.")],
    authority: AuthorityDir = Path(),
    as_json: Json = False,
) -> None:
    """Revoke somebody's certificates for good, and sign the roster that says so."""
    from hansa.cli import certificates

    certificates.revoke(who, reason, authority, as_json=as_json)


@app.command()
def roster(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")],
    authority: AuthorityDir = Path(),
    above: Annotated[
        int | None,
        typer.Option(min=0, help="Sign it anew, above this version: for an authority restored from a backup."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the newest roster, to bring to server and sites."""
    from hansa.cli import certificates

    certificates.roster(out, authority, above, as_json=as_json)


@app.command()
def take(
    file: Annotated[Path, typer.Argument(metavar="ROSTER", help="A roster of this federation.")],
    directory: KitDir = Path(),
    as_json: Json = False,
) -> None:
    """Put a newer roster into a kit; a running server or site goes on with it."""
    from hansa.cli import certificates

    certificates.take(file, directory, as_json=as_json)


@app.command()
def show(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A certificate, request, reply, roster, kit or authority.")
    ] = Path(),
    authority: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The authority's certificate, to check a roster that lies elsewhere."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a certificate, request, reply, roster, kit or authority is, and whether it counts."""
    from hansa.cli import certificates

    certificates.show(path, authority, as_json=as_json)


def provision(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    federation: Annotated[str, typer.Option(help="The federation's name: small letters, digits, dashes.")],
    server: Annotated[str, typer.Option(metavar="HOST[:PORT]", help="Where sites reach the server.")],
    sites: Annotated[list[str] | None, typer.Option("--site", help="A site's name. May be repeated.")] = None,
    leads: Annotated[
        list[str] | None, typer.Option("--lead", help="Somebody who may submit jobs. May be repeated.")
    ] = None,
    observers: Annotated[
        list[str] | None, typer.Option("--observer", help="Somebody who may watch. May be repeated.")
    ] = None,
    admins: Annotated[
        list[str] | None, typer.Option("--admin", metavar="SITE/NAME", help="A site's admin. May be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a whole federation in one go, for a laboratory: authority, server, sites and people."""
    from hansa.cli import certificates

    certificates.provision(
        directory, federation, server, sites or [], leads or [], observers or [], admins or [], as_json=as_json
    )
