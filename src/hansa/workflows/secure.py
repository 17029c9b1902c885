# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation, the server's side: what a plan's answers add up to, without seeing any of them.

    advertise ─> share ─> receive ─> the plan, answered by masked vectors ─> vote ─> reveal ─> the sum ─> finish

A site that is silent or refused in any phase is an absence; the sum is that of the others, or there is none
(``secagg.protocol`` says what holds). What has to outlive a crash is in the scratch folder: the server's state, and the
masked sum, which is on the disk before anybody is asked to unmask it.

| case | result |
|---|---|
| killed before the survivors are fixed | another attempt, with other keys; nothing was revealed |
| killed later | the same session goes on with the sum on the disk; nobody trains again |
| killed while the round's model is evaluated | the round's sum is unmasked again from the disk; nobody is asked |
| a masked vector that is malformed | its site is rejected, nothing of it is added |
| fewer sites than the job's minimum in any phase | QuorumError; no sum is shown |
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hansa import registry
from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.config import SecretSums, SecureAggregationSection
from hansa.core.lazy import BLOCK
from hansa.core.ports import Cohort, Handle, Phase
from hansa.core.tree import Array, Layout, Spec, Tree
from hansa.core.values import Absence, Plan
from hansa.errors import FitError, HansaError, StorageError, WireError
from hansa.privacy.plan import SLACK, Terms
from hansa.privacy.protect import deviation_of_share, grid_of

MASKED, VECTOR = "masked", "vector"
"""The one part, and the one tensor, of a masked update."""


@dataclass
class Sum:
    """What a plan's answers add up to.

    Attributes:
        sites: whose answers are in it.
        parts: the summed parts, in float32 or wider.
        weight: the sum of weights.
        metrics: the sums of the metrics that the job names.
        absent: the sites whose answers are not in it, and why.
        seconds: site -> how long it worked.
        num_bytes: of what the sites sent.
    """

    sites: tuple[str, ...]
    parts: dict[str, Tree]
    weight: float
    metrics: dict[str, float]
    absent: list[Absence] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: int = 0


class _Kept(msgspec.Struct, frozen=True):
    """What outlives a crash: the session's terms, and the server's state."""

    terms: bytes
    state: bytes | None


def bounds_of(section: SecretSums, private: Terms | None, num_sites: int) -> Any:
    """Return what one site may put into a sum (:class:`hansa.secagg.agreement.Bounds`).

    Args:
        section: the job's words on secret sums.
        private: the terms of its privacy plan, whose clip bounds updates, and whose noise is in them.
        num_sites: how many sites are asked.
    """
    bounds = registry.load_object("hansa.secagg.agreement:Bounds")
    if private is None or private.section.mechanism == "local":
        return registry.load_object("hansa.secagg.agreement:bounds_of")(section)
    if private.section.adaptive_clip:
        return bounds(section.range, 1.0, section.step or 1e-9)
    clip = private.section.clip
    if private.section.mechanism != "distributed":
        return bounds(clip * SLACK, 1.0, section.step or clip / (1 << 20))
    grid = grid_of(clip)
    assert isinstance(section, SecureAggregationSection), "shares of noise are for masks"
    noise = deviation_of_share(private, honest_of(section, num_sites), grid)
    return bounds(clip * SLACK + (12 * noise + 16) * grid, 1.0, grid)


def honest_of(section: SecureAggregationSection, num_sites: int) -> int:
    """Return how many sites of every sum that is shown do not work with the server."""
    shape = registry.load_object("hansa.secagg.graph:shape")(
        num_sites, num_sites, section.corrupt, section.dropout, section.minimum
    )
    return int(shape.quorum - math.floor(section.corrupt * num_sites))


class Session:
    """One sum; arguments are those of :func:`hansa.workflows.sums.gather`.

    Attributes:
        absent: who is not in it, and why.

    Raises:
        PrivacyError: terms that protect nobody, or a ring that does not hold the sum.
    """

    def __init__(
        self,
        section: SecureAggregationSection,
        private: Terms | None,
        cohort: Cohort,
        plan: Plan,
        asked: Sequence[str],
        expected: Mapping[str, Layout],
        weighed: Mapping[str, bool],
        scratch: Path,
    ) -> None:
        # by name: they need the extra that has ``cryptography``
        terms_of = registry.load_object("hansa.secagg.agreement:terms")
        number = registry.load_object("hansa.secagg.agreement:number_of")(plan.round, plan.task)
        terms_type = registry.load_object("hansa.secagg.protocol:Terms")
        unpack = registry.load_object("hansa.secagg.protocol:unpack")
        self._pack: Any = registry.load_object("hansa.secagg.protocol:pack")
        self.absent: list[Absence] = []
        if cohort.secure is None:
            raise FitError("Secure aggregation has no way to the sites here.", job=plan.job)
        self._line, self._cohort = cohort.secure, cohort
        self._plan, self._expected = plan, expected
        self._path = scratch / f"secure.{plan.job}.{plan.task}.state"
        self._sum_path = scratch / f"secure.{plan.job}.{plan.task}.sum"
        self._held = _read(self._path)
        shapes = {part: {name: spec.shape for name, spec in layout.items()} for part, layout in expected.items()}

        def terms(attempt: int) -> Any:
            bounds = bounds_of(section, private, len(asked))
            return terms_of(section, bounds, self._line.scope + plan.job, number, attempt, asked, shapes, weighed)

        self.terms = terms(1)
        held = None if self._held is None else unpack(self._held.terms, terms_type)
        if held is not None and held.round == number and self._held is not None:
            self.terms = terms(held.attempt)
            found = self._server(self._held.state) if held == self.terms else None
            if found is None or not found.survivors:  # nothing was revealed: with other keys
                self.terms, self._held = terms(held.attempt + 1), None
        else:
            self._held = None
        self._letter = self._pack(self.terms)
        self._machine = self._server(None if self._held is None else self._held.state)

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
        found = sum_of(self.terms.encoding, unmasked, self._expected, survivors)
        found.absent, found.seconds, found.num_bytes = self.absent, seconds, num_bytes
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


def sum_of(encoding: Any, total: Array, expected: Mapping[str, Layout], sites: Sequence[str]) -> Sum:
    """Return what a vector of integers says that updates add up to.

    Args:
        encoding: what the summands were made by (:class:`hansa.secagg.ring.Encoding`).
        total: their sum, readable; large leaves read it when they are read.
        expected: part -> layout of what was summed beside the numbers.
        sites: whose they are.

    Raises:
        WireError: so many sites can't have put that in.
    """
    decoded = registry.load_object("hansa.secagg.ring:decoded")(encoding, total, len(sites))
    beside = decoded[registry.load_object("hansa.secagg.ring:SCALARS")]
    scalars = {name: float(np.asarray(leaf)) for name, leaf in trees.leaves(beside).items()}
    parts: dict[str, Tree] = {}
    for part, layout in expected.items():
        leaves = trees.leaves(decoded[part])
        kinds = {name: trees.wide(trees.dtype_of(spec.dtype)) for name, spec in layout.items()}
        sums = {name: leaves[name].astype(kinds[name]) for name in layout}
        large = sum(leaf.nbytes for leaf in sums.values()) > trees.LARGE
        parts[part] = trees.Lazy(sums) if large else {name: np.asarray(leaf) for name, leaf in sums.items()}
    weight = scalars.pop(registry.load_object("hansa.secagg.ring:WEIGHT"))
    return Sum(tuple(sites), parts, weight, scalars)


def _read(path: Path) -> _Kept | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise StorageError(f"The state of secure aggregation in {path} can't be read: {error}.") from error


def mapped(path: Path, dtype: np.dtype[Any], size: int) -> np.memmap[Any, Any]:
    """Return ``size`` zeros in a new file, whose blocks are claimed: a disk found full later ends the process."""
    try:
        path.unlink(missing_ok=True)  # what is mapped from an older one stays
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return np.memmap(path, dtype, "r+", shape=(size,))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage.full(path, error) from error
