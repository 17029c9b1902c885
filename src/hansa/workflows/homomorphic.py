# SPDX-License-Identifier: Apache-2.0
"""Homomorphic encryption, the server's side: what a plan's answers add up to, without the key to any of them.

    offer ─> accept ─> the plan, answered by ciphertexts ─> who is in the sum ─> open, part by part ─> the sum ─> finish

The key site is asked to offer, open and finish whether or not it is among the sites asked for an update.

``homomorphic.protocol`` says what holds. The sum of ciphertexts and the opened one lie in the scratch folder, one
element after the other, so memory does not depend on the model's size; this side needs NumPy only.

| case | result |
|---|---|
| a site that is silent or refused before its ciphertexts are whole | left out of the sum |
| ciphertexts that are malformed, or not of the number agreed | their site is rejected, nothing of them is added |
| the key site is silent or refuses, whenever it is asked | QuorumError that names it; nothing is shown |
| fewer sites than the job's minimum | QuorumError; nothing is opened |
| the key site has lost its folder, with the keys of the sum | QuorumError that says so; resumed, all are asked anew |
| killed before it is fixed who is in the sum | the same session, the same key; answers that are there count |
| killed later | the same sum is opened again from the disk; nobody trains again |
| killed while the round's model is evaluated | the opened sum is on the disk; nobody is asked |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hansa import registry
from hansa.core import storage
from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.ports import Cohort, Handle, Phase
from hansa.core.tree import Array, Spec
from hansa.core.values import Absence
from hansa.errors import FitError, HansaError, QuorumError, StorageError, WireError
from hansa.workflows.secure import Question, Sum, mapped

SEALED, CIPHERTEXTS = "sealed", "ciphertexts"
"""The one part, and the one tensor, of an encrypted update."""


class Session:
    """One sum.

    Attributes:
        absent: who is not in it, and why.

    Raises:
        FitError: the update is larger than the job allows.
        PrivacyError: terms that protect nobody, or a step that is too fine.
    """

    def __init__(self, question: Question, section: HomomorphicEncryptionSection, cohort: Cohort) -> None:
        # by name: they need the extra that has ``cryptography``
        terms_of = registry.load_object("hansa.homomorphic.agreement:terms")
        plan, asked = question.plan, question.asked
        number = registry.load_object("hansa.secagg.agreement:number_of")(plan.round, plan.task)
        server = registry.load_object("hansa.homomorphic.server:Server")
        attempt_at = registry.load_object("hansa.homomorphic.server:attempt_at")
        pack = registry.load_object("hansa.homomorphic.protocol:pack")
        self.absent: list[Absence] = []
        if cohort.secure is None:
            raise FitError("Homomorphic encryption has no way to the sites here.", job=plan.job)
        if section.key_site is not None and section.key_site not in cohort.sites:
            raise FitError(
                f"homomorphic_encryption.key_site is {section.key_site!r}, which does not take part in the job; these "
                f"do: {', '.join(cohort.sites)[:200]}.",
                job=plan.job,
            )
        self._line, self._cohort = cohort.secure, cohort
        self._question, self._plan = question, plan
        state = question.scratch / f"secure.{plan.job}.{plan.task}.encrypted.state"
        self._sum_path = state.with_suffix(".sum")
        scope = self._line.scope + plan.job
        stored = _read(state)
        attempt = attempt_at(number, stored)
        terms = terms_of(section, question.bounds, scope, number, attempt, asked, question.shapes, question.weighed)
        self._letter = pack(terms)
        self._machine = server(terms, self._line.checker, lambda new: storage.write_atomic(state, new), stored)

    async def carry_out(self) -> Sum:
        """Return the sum.

        Raises:
            QuorumError: too few answered, or the key site did not.
        """
        machine = self._machine
        encoding = machine.terms.encoding
        plain = self._sum_path.with_suffix(".plain")
        seconds: dict[str, float] = {}
        num_bytes = 0
        if not machine.survivors:
            invitation = machine.invite(await self._key_site("offer", self._letter))
            ready = await self._invited(invitation)
            total = mapped(self._sum_path, _WORD, machine.terms.num_words)
            accepted = []
            async for reply in self._cohort.ask(self._plan, ready):
                if isinstance(reply, Absence):
                    self.absent.append(reply)
                    continue
                header = reply.header
                try:
                    self._add(total, reply)
                except HansaError as error:
                    self.absent.append(Absence(header.site, "rejected", error.message))
                else:
                    accepted.append(header.site)
                    seconds[header.site], num_bytes = header.seconds, num_bytes + header.num_bytes
                reply.release()
            storage.flush(total)
            machine.close(accepted)
        if not machine.is_opened:
            added = _again(self._sum_path, _WORD, machine.terms.num_words)
            sums = mapped(plain, encoding.signed, encoding.size)
            for places, letter in machine.parts(added):
                sums[places] = machine.opened(places, await self._key_site("open", letter))
            storage.flush(sums)
        finish = machine.finish()
        found = Sum(tuple(machine.survivors), self.absent, seconds=seconds, num_bytes=num_bytes)
        found.decode(self._question, encoding, _again(plain, encoding.dtype, encoding.size))
        del found.metrics[registry.load_object("hansa.homomorphic.agreement:COUNT")]
        await self._line.exchange(self._plan, "finish", {machine.terms.key_site: finish})
        return found

    async def _key_site(self, phase: Phase, letter: bytes) -> bytes:
        site = self._machine.terms.key_site
        answer = (await self._line.exchange(self._plan, phase, {site: letter}))[site]
        if isinstance(answer, Absence):
            self.absent.append(answer)
            what = "gives no key" if phase == "offer" else "does not open the sum"
            raise QuorumError(f"{site}, which has the key of homomorphic encryption, {what}. Resume when it is back.")
        return answer

    async def _invited(self, invitation: bytes) -> list[str]:
        """Have sites take the keys, and return those that did."""
        letters = dict.fromkeys(self._machine.terms.sites, invitation)
        ready = []
        for site, answer in (await self._line.exchange(self._plan, "accept", letters)).items():
            if isinstance(answer, Absence):
                self.absent.append(answer)
                continue
            try:
                self._machine.accept(site, answer)
            except HansaError as error:
                self.absent.append(Absence(site, "rejected", error.message))
            else:
                ready.append(site)
        return ready

    def _add(self, total: Array, reply: Handle) -> None:
        """Add a site's ciphertexts once the whole of them has been read and found sound."""
        header, size = reply.header, self._machine.terms.num_words
        wanted = {SEALED: {CIPHERTEXTS: Spec(_WORD.name, (size,))}}
        if header.layout != wanted or header.sums or header.logged or header.weight != 1.0:
            raise WireError("The answer is no ciphertexts of this session.", site=header.site, round=header.round)
        self._question.check(header)
        for chunk in reply.chunks():  # lengths and digests are checked as they are read
            self._machine.check(chunk.values)
        for chunk in reply.chunks():
            self._machine.add(total[chunk.start : chunk.start + chunk.values.size], chunk.values)


_WORD = np.dtype(np.uint64)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"The state of homomorphic encryption in {path} can't be read: {error}.") from error


def _again(path: Path, dtype: np.dtype[Any], size: int) -> Array:
    """Return what is in a file, one element after the other."""
    try:
        return np.memmap(path, dtype, "r", shape=(size,))
    except (OSError, ValueError) as error:
        raise StorageError(f"The encrypted sum in {path} can't be read: {error}.") from error
