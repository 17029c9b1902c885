# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation, the server's side: what a plan's answers add up to, without seeing any of them.

    advertise ─> share ─> receive ─> the plan, answered by masked vectors ─> vote ─> reveal ─> the sum ─> finish

A site that is silent or refused in any phase is an absence; the sum is that of the others, or there is none
(``secagg.protocol`` says what holds). What has to outlive a crash is in the scratch folder: the server's state, and the
masked sum, which is on the disk before anybody is asked to unmask it.

| case | result |
|---|---|
| killed before the survivors are fixed, its folder lost or not | another attempt, with other keys |
| killed later | the same session goes on with the sum on the disk; nobody trains again |
| killed while the round's model is evaluated | the round's sum is unmasked again from the disk; nobody is asked |
| a masked vector that is malformed | its site is rejected, nothing of it is added |
| fewer sites than the job's minimum in any phase | QuorumError; no sum is shown |
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hansa import registry
from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.config import HomomorphicEncryptionSection, SecretSums, SecureAggregationSection
from hansa.core.lazy import BLOCK
from hansa.core.ports import Cohort, Handle, Phase, SecureLine
from hansa.core.tree import Array, Layout, Spec, Tree
from hansa.core.values import Absence, Header, Logged, Plan
from hansa.errors import HansaError, NonFiniteError, PrivacyError, QuorumError, StorageError, WireError
from hansa.privacy.plan import SLACK, Terms
from hansa.privacy.protect import deviation_of_share, grid_of
from hansa.secagg import graph, ranges
from hansa.secagg.ranges import Bounds
from hansa.secagg.ring import Encoding, Vector, decoded

MASKED, VECTOR = "masked", "vector"
"""The one part, and the one tensor, of a masked update."""


@dataclass(frozen=True)
class Question:
    """A plan whose answers are to be summed.

    Attributes:
        section: the job's words on secret sums.
        plan: what is asked.
        asked: who is.
        scratch: a folder that outlives a crash.
        private: the terms of the job's privacy plan.
        expected: part -> layout of what is summed beside weight and metrics.
        weighed: which parts are multiplied by the weight.
        problem: why an answer of this header is not to be summed, or None.
    """

    section: SecureAggregationSection | HomomorphicEncryptionSection
    plan: Plan
    asked: Sequence[str]
    scratch: Path
    private: Terms | None = None
    expected: Mapping[str, Layout] = field(default_factory=dict)
    weighed: Mapping[str, bool] = field(default_factory=dict)
    problem: Callable[[Header], str | None] = lambda header: None

    @property
    def shapes(self) -> ranges.Shapes:
        """The shapes of the tensors."""
        return {part: {name: spec.shape for name, spec in layout.items()} for part, layout in self.expected.items()}

    @property
    def bounds(self) -> Bounds:
        """What one site may put into the ring."""
        return bounds_of(self.section, self.private, len(self.asked))

    def check(self, header: Header) -> None:
        """Raise WireError if an answer of this header is not to be summed."""
        why = self.problem(header)
        if why is not None:
            raise WireError(why, site=header.site, round=header.round)


@dataclass
class Sum:
    """What a plan's answers add up to.

    Attributes:
        sites: whose answers are in it.
        absent: those that are not, and why.
        parts: the summed parts, in float32 or wider.
        weight: the sum of weights.
        metrics: the sums of the metrics that the job names.
        seconds: site -> how long it worked.
        num_bytes: of what they sent.
        seen: site -> its own metrics' sums, where nobody hides them.
        logged: site -> what its script logged, likewise.
    """

    sites: tuple[str, ...]
    absent: list[Absence] = field(default_factory=list)
    parts: dict[str, Tree] = field(default_factory=dict)
    weight: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    seen: dict[str, Mapping[str, float]] = field(default_factory=dict)
    logged: dict[str, Logged] = field(default_factory=dict)

    def decode(self, question: Question, encoding: Encoding, total: Array) -> None:
        """Take parts, weight and metrics from a vector of integers.

        Args:
            question: what was asked.
            encoding: what the summands were made by.
            total: their sum, readable; large leaves read it when they are read.

        Raises:
            WireError: so many sites can't have put that in.
        """
        summed = decoded(encoding, total, len(self.sites))
        for part, layout in question.expected.items():
            leaves = trees.leaves(summed[part])
            kinds = {name: trees.wide(trees.dtype_of(spec.dtype)) for name, spec in layout.items()}
            sums = {name: leaves[name].astype(kinds[name]) for name in layout}
            large = sum(leaf.nbytes for leaf in sums.values()) > trees.LARGE
            self.parts[part] = trees.Lazy(sums) if large else {name: np.asarray(leaf) for name, leaf in sums.items()}
        self.weight, self.metrics = ranges.sums_from(summed)


class _Kept(msgspec.Struct, frozen=True):
    """What outlives a crash: the session's terms, and the server's state."""

    terms: bytes
    state: bytes | None


def bounds_of(section: SecretSums, private: Terms | None, num_sites: int) -> Bounds:
    """Return what one site may put into a sum.

    Args:
        section: the job's words on secret sums.
        private: the terms of its privacy plan, whose clip bounds updates, and whose noise is in them.
        num_sites: how many sites are asked.
    """
    if private is None or private.section.mechanism == "local":
        return ranges.bounds_of(section)
    if private.section.adaptive_clip:
        return Bounds(section.range, 1.0, section.step or 1e-9)
    clip = private.section.clip
    if private.section.mechanism != "distributed":
        return Bounds(clip * SLACK, 1.0, section.step or clip / (1 << 20))
    grid = grid_of(clip)
    assert isinstance(section, SecureAggregationSection), "shares of noise are for masks"
    noise = deviation_of_share(private, honest_of(section, num_sites), grid)
    return Bounds(clip * SLACK + (12 * noise + 16) * grid, 1.0, grid)


def honest_of(section: SecureAggregationSection, num_sites: int) -> int:
    """Return how many sites of every sum that is shown do not work with the server."""
    return quorum_of(section, num_sites) - math.floor(section.corrupt * num_sites)


def quorum_of(section: SecureAggregationSection, num_sites: int) -> int:
    """Return how many of so many sites that are asked have to answer.

    Raises:
        PrivacyError: so few protect nobody.
    """
    return graph.shape(num_sites, num_sites, section.corrupt, section.dropout, section.minimum).quorum


class Openly:
    """One sum of sites that need not hide: their answers, added up in the ring without masks.

    Attributes:
        absent: who is not in it, and why.

    Raises:
        PrivacyError: so few sites are asked that masks would protect nobody.
    """

    def __init__(self, question: Question, section: SecureAggregationSection, cohort: Cohort) -> None:
        self._question, self._cohort = question, cohort
        self._quorum = quorum_of(section, len(question.asked))
        num_sites = len(question.asked)
        self._ring = ranges.ring_of(section, question.bounds, num_sites, question.shapes, question.weighed)
        self.absent: list[Absence] = []

    async def carry_out(self) -> Sum:
        """Return the sum.

        Raises:
            QuorumError: fewer answered than masks would need.
        """
        question, ring = self._question, self._ring
        path = question.scratch / f"secure.{question.plan.job}.{question.plan.task}.open"
        total = mapped(path, ring.dtype, ring.size)
        path.unlink()  # what is mapped stays: a round of a simulation that is killed is made anew
        found = Sum((), self.absent)
        async for reply in self._cohort.ask(question.plan, question.asked):
            if isinstance(reply, Absence):
                self.absent.append(reply)
                continue
            header = reply.header
            try:
                question.check(header)
                self._add(total, reply)
            except (WireError, NonFiniteError, PrivacyError) as error:
                self.absent.append(Absence(header.site, "refused", error.message))
            else:
                found.sites = (*found.sites, header.site)
                found.seen[header.site], found.seconds[header.site] = header.sums, header.seconds
                found.num_bytes += header.num_bytes
                if header.logged:
                    found.logged[header.site] = header.logged
            reply.release()
            del reply  # or it would be held while the next site trains
        found.sites = tuple(sorted(found.sites))
        if len(found.sites) < self._quorum:
            num_sites = len(question.asked)
            raise QuorumError(
                f"{len(found.sites)} of {num_sites} sites answered; secure aggregation needs {self._quorum}."
            )
        found.decode(question, ring, total)
        return found

    def _add(self, total: Array, reply: Handle) -> None:
        """Add one answer, once the whole of it is known to be within its ranges."""
        header, ring = reply.header, self._ring
        values = ranges.values_for(ring, reply.parts, header.weight, header.sums)
        vector = Vector(ring, values, header.site, self._question.plan.round)
        block = np.empty(min(BLOCK, ring.size), ring.dtype)
        for adding in (True,) if ring.size <= BLOCK else (False, True):
            for start in range(0, ring.size, BLOCK):
                encoded = block[: ring.size - start]
                vector.encode(start, encoded)
                if adding:
                    total[start : start + encoded.size] += encoded


class Session:
    """One sum under masks.

    Attributes:
        absent: who is not in it, and why.

    Raises:
        PrivacyError: terms that protect nobody, or a ring that does not hold the sum.
    """

    def __init__(
        self, question: Question, section: SecureAggregationSection, cohort: Cohort, line: SecureLine, attempts: int
    ) -> None:
        # by name: they need the extra that has ``cryptography``
        terms_of = registry.load_object("hansa.secagg.agreement:terms")
        plan = question.plan
        number = registry.load_object("hansa.secagg.agreement:number_of")(plan.round, plan.task)
        terms_type = registry.load_object("hansa.secagg.protocol:Terms")
        unpack = registry.load_object("hansa.secagg.protocol:unpack")
        self._pack: Any = registry.load_object("hansa.secagg.protocol:pack")
        self.absent: list[Absence] = []
        self._line, self._cohort, self._question, self._plan = line, cohort, question, plan
        self._path = question.scratch / f"secure.{plan.job}.{plan.task}.state"
        self._sum_path = question.scratch / f"secure.{plan.job}.{plan.task}.sum"
        course, shapes = self._line.scope + plan.job, question.shapes

        def terms(attempt: int) -> Any:
            return terms_of(section, question.bounds, course, number, attempt, question.asked, shapes, question.weighed)

        stored = _read(self._path)
        held = None if stored is None else unpack(stored.terms, terms_type)
        self._machine: Any = None
        if stored is not None and held is not None and held.round == number:
            attempts = max(attempts, held.attempt)
            self.terms = terms(held.attempt)
            self._machine = self._server(stored.state) if held == self.terms else None
        if self._machine is None or not self._machine.survivors:  # nothing was revealed: with other keys
            self.terms = terms(attempts + 1)
            self._machine = self._server(None)
        self._letter = self._pack(self.terms)

    def _server(self, state: bytes | None) -> Any:
        terms = self._pack(self.terms)

        def store(new: bytes) -> None:
            storage.write_atomic(self._path, msgspec.msgpack.encode(_Kept(terms, new)))

        made = registry.load_object("hansa.secagg.server:Server")
        return made(self.terms, self._line.checker, store, state)

    async def carry_out(self) -> Sum:
        """Return the sum.

        Raises:
            QuorumError: too few answered in some phase.
        """
        machine = self._machine
        seconds: dict[str, float] = {}
        num_bytes = 0
        if not machine.survivors:
            await self._round("advertise", dict.fromkeys(self.terms.sites, self._letter), machine.add_advert)
            roll = machine.close_adverts()
            there = [site for site in self.terms.sites if site not in self._gone]
            await self._round("share", dict.fromkeys(there, roll), machine.add_shares)
            dealers = machine.close_shares()
            await self._round("receive", {site: machine.inbox(site) for site in dealers}, None)
            ready = [site for site in dealers if site not in self._gone]
            total = mapped(self._sum_path, self.terms.encoding.dtype, self.terms.encoding.size)
            async for reply in self._cohort.ask(self._plan, ready):
                if isinstance(reply, Absence):
                    self._leave(reply)
                    continue
                site = reply.header.site
                try:
                    self._add(total, reply)
                    machine.accept(site)
                except HansaError as error:
                    self._leave(Absence(site, "rejected", error.message))
                else:
                    seconds[site], num_bytes = reply.header.seconds, num_bytes + reply.header.num_bytes
                reply.release()
            total.flush()
            del total
            machine.close_uploads()
        survivors = machine.survivors
        if not machine.is_recovered:  # else a restart found all shares on the disk; sites may have forgotten theirs
            await self._round("vote", dict.fromkeys(survivors, machine.close_uploads()), machine.add_vote)
            votes = machine.close_votes()
            await self._round("reveal", dict.fromkeys(survivors, votes), machine.add_reveal)
        unmasked = self._unmasked(machine.close_reveals())
        found = Sum(tuple(survivors), self.absent, seconds=seconds, num_bytes=num_bytes)
        found.decode(self._question, self.terms.encoding, unmasked)
        await self._line.exchange(self._plan, "finish", dict.fromkeys(survivors, self._letter))
        return found

    @property
    def _gone(self) -> set[str]:
        return {absence.site for absence in self.absent}

    def _leave(self, absence: Absence) -> None:
        if absence.site not in self._gone:
            self.absent.append(absence)

    async def _round(self, phase: Phase, letters: Mapping[str, bytes], take: Any) -> None:
        """Send every site its message, and take the answers; who fails is absent from here on."""
        for site, answer in (await self._line.exchange(self._plan, phase, letters)).items():
            if isinstance(answer, Absence):
                self._leave(answer)
            elif take is not None:
                try:
                    take(site, answer)
                except HansaError as error:
                    self._leave(Absence(site, "rejected", error.message))

    def _add(self, total: Array, reply: Handle) -> None:
        """Add a masked vector once the whole of it has been read and found sound."""
        header, ring = reply.header, self.terms.encoding
        wanted = {MASKED: {VECTOR: Spec(ring.dtype.name, (ring.size,))}}
        if header.layout != wanted or header.sums or header.logged or header.weight != 1.0:
            raise WireError("The answer is no masked vector of this session.", site=header.site, round=header.round)
        self._question.check(header)
        self._machine.check_upload(header.site, ring.size, ring.dtype)
        for _ in reply.chunks():  # checks lengths and digests
            pass
        for chunk in reply.chunks():
            part = total[chunk.start : chunk.start + chunk.values.size]
            np.add(part, chunk.values, out=part)

    def _unmasked(self, masks: Any) -> Array:
        """Return the sum without its masks, beside the masked one, which a restart needs again."""
        ring = self.terms.encoding
        masked = np.memmap(self._sum_path, ring.dtype, "r", shape=(ring.size,))
        plain = mapped(self._sum_path.with_suffix(".plain"), ring.dtype, ring.size)
        for start in range(0, ring.size, BLOCK):
            block = np.array(masked[start : start + BLOCK])
            masks.apply(start, block)
            plain[start : start + BLOCK] = block
        return plain


def _read(path: Path) -> _Kept | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise StorageError(f"The state of secure aggregation in {path} can't be read: {error}.") from error


def mapped(path: Path, dtype: np.dtype[Any], size: int) -> np.memmap[Any, Any]:
    """Return ``size`` zeros in a file, whose blocks are claimed: a disk found full later ends the process."""
    spares, num_bytes = storage.Spares(path.parent / storage.SPARES), size * dtype.itemsize
    try:
        spares.give(path)  # what is mapped from an older one stays
        used = spares.take(path, num_bytes)
        with path.open("r+b" if used else "wb") as file:
            file.truncate(num_bytes)
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        found = np.memmap(path, dtype, "r+", shape=(size,))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage.full(path, error) from error
    if used:
        found[:] = 0
    return found
