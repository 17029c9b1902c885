# SPDX-License-Identifier: Apache-2.0
"""The server's part in messages between sites: it has them sealed, keeps them for a round, and can't open them.

    workflow ── send(A, B) ──>  ask B: its address for this round    B: a fresh key, signed
                                ask A: post for that address         A: its message, sealed for B: an upload
             ── ask(plan, B) ──> the plan tells B where the file is  B: fetches, checks and opens it, trains

Addresses and posts are tasks, and what was sent is noted on the disk, so a server that was killed asks nobody twice. A
message to the server itself is not sealed: it is the model that the round ends with. The server's own message travels
in the plan of whoever it is for.

| case | result |
|---|---|
| a site that is gone, or refuses | its absence, for the workflow to go on without it |
| an address or message that its site did not sign, or for something else | ``rejected``, with an audit entry |
| a message to the server that is not of the model's form | ``rejected``, with an audit entry |
| sent to another peer after that | both messages are kept, so a round made again after a restart has the same course |
| the round is over | its messages are deleted, with the notes |
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.ports import SERVER, MailPhase, topic
from hansa.core.tree import Layout, Parts
from hansa.core.values import Absence, Plan
from hansa.errors import HansaError, StorageError, WireError
from hansa.pki import sealed
from hansa.pki.identity import Role
from hansa.pki.sealed import Place
from hansa.server.store import TaskRow
from hansa.transport.messages import Missing, Posting

if TYPE_CHECKING:
    from hansa.server.remote import Remote

_PARAMS = "params"


class _Sent(msgspec.Struct):
    """A message that was sent.

    Attributes:
        update: the key of the post's update, which is the message.
        plan: the address under which its recipient fetches it; empty for the server.
    """

    update: str
    plan: str


class RemotePeers:
    """Mailboxes between sites that reach each other through the server only (:class:`hansa.core.ports.Peers`).

    Args:
        engine: the sites.
        directory: the folder of notes of what was sent: ``COURSE/ROUND/SENDER/RECIPIENT``.
    """

    def __init__(self, engine: Remote, directory: Path) -> None:
        self._engine = engine
        self._directory = directory
        self._own: Parts = {}

    async def put(self, plan: Plan, parts: Parts) -> None:
        """Let ``parts`` be the server's message; what sites send the server must be of their form."""
        self._own = parts

    async def send(self, plan: Plan, sender: str, recipient: str) -> Absence | None:
        """Have the message of ``sender`` sealed for ``recipient``, and keep it for him to fetch."""
        if sender == SERVER or self._note(plan, sender, recipient).exists():
            return None
        address = b""
        if recipient != SERVER:
            asked = await self._asked(plan, "address", recipient, b"address")
            if isinstance(asked, Absence):
                return asked
            address = asked.answer
            try:
                sealed.read_address(address, self._place(plan), recipient, self._engine.masks[1])
            except HansaError as error:
                return await asyncio.to_thread(self._rejected, recipient, error)
        posted = await self._asked(plan, "post", sender, msgspec.msgpack.encode(Posting(recipient, address)))
        if isinstance(posted, Absence):
            return posted
        try:
            await asyncio.to_thread(self._keep, plan, sender, recipient, posted)
        except StorageError:
            raise
        except HansaError as error:
            return await asyncio.to_thread(self._rejected, sender, error)
        return None

    async def take(self, plan: Plan, sender: str) -> Parts:
        """Return what ``sender`` has sent to the server."""
        return self._engine.kept(_read(self._note(plan, sender, SERVER)).update).parts

    def addressed(self, plan: Plan, site: str) -> Plan:
        """Return the plan as ``site`` gets it: with the server's message in it, or with where the sealed one is.

        Raises:
            StorageError: the message can't be read, the disk is full.
        """
        if plan.inbox is None:
            return plan
        sender = plan.inbox.removeprefix(topic(plan.job, ""))
        if sender == SERVER:
            return replace(plan, inbox=None, params=self._own[_PARAMS])
        sent = _read(self._note(plan, sender, site))
        return replace(plan, sealed=self._engine.publish_update(sent.update, sent.plan))

    def held(self) -> set[str]:
        """Return the addresses of the files that recipients may still fetch."""
        return {_read(path).plan for path in self._directory.glob("*/*/*/*.json")}

    def forget(self, course: str, before: int) -> None:
        """Forget what was sent in rounds before ``before``; the files go with the tasks that they answer."""
        for folder in (self._directory / course).glob("*"):
            if int(folder.name) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def _note(self, plan: Plan, sender: str, recipient: str) -> Path:
        return self._directory / plan.job / str(plan.round) / sender / f"{recipient}.json"

    def _place(self, plan: Plan) -> Place:
        return Place(self._engine.masks[0], plan.job, plan.round)

    async def _asked(self, plan: Plan, kind: MailPhase, site: str, letter: bytes) -> TaskRow | Absence:
        engine = self._engine
        digests = await asyncio.to_thread(engine.publish_letters, {site: letter})
        answers = engine.answers(plan.job, plan.round, kind, digests, [site], None)
        async with contextlib.aclosing(answers):
            async for row in answers:
                return row if row.state == "done" else absence(row)
        raise AssertionError("every site that is asked is answered for")

    def _keep(self, plan: Plan, sender: str, recipient: str, posted: TaskRow) -> None:
        """Note a message that has come, if it is one that may be sent on.

        Raises:
            WireError, AccessError: it is not.
            StorageError: it can't be read or noted.
        """
        update = self._engine.kept(posted.update)
        file = ""
        if recipient == SERVER:
            _check_model(update.header.layout, self._own)
        else:
            sealed.check_form(update.path, self._place(plan), sender, recipient, self._engine.masks[1])
            file = self._engine.publish_update(posted.update)
        note = self._note(plan, sender, recipient)
        note.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(note, _Sent(posted.update, file))

    def _rejected(self, site: str, error: HansaError) -> Absence:
        engine = self._engine
        engine.store.audit(f"site/{site}", Role.SITE.value, "mail", engine.id, "refused", error.message)
        return Absence(site, "rejected", error.message)


def _read(note: Path) -> _Sent:
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Sent)
    except (OSError, msgspec.MsgspecError) as error:
        raise StorageError(f"The note of a message in {note} can't be read: {error}.") from error


def _check_model(found: Mapping[str, Layout], own: Parts) -> None:
    """Raise WireError unless a message to the server is of the form of its own."""
    if found != {part: trees.layout_of(tree) for part, tree in own.items()}:
        raise WireError("The message that the round was to end with is not of the model's form.")


def absence(row: TaskRow) -> Absence:
    """Return why there is no answer to a task."""
    if not row.answer:
        return Absence(row.site, "lost", "was not asked any more")
    said = msgspec.json.decode(row.answer, type=Missing)
    return Absence(row.site, said.kind, said.reason)
