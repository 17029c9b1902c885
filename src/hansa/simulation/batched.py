# SPDX-License-Identifier: Apache-2.0
"""The ``batched`` engine: many small sites, trained as one vectorised computation in this process.

Sites are taken in the order of their names, a chunk at a time, so that memory does not grow with their number, and
each chunk's parameters get a leading axis, one row a site (``torch.func.vmap``). What all sites have in common
(the model they start from, FedProx's anchor) is not copied; what each has of its own (SCAFFOLD's controls) is
stacked. Sites need not be alike:

- a site with fewer steps leaves the computation when it is done, so nothing is computed for it in vain;
- a batch with fewer rows than the chunk's widest is filled up with rows that a mask takes out of loss and metrics.

Equal to ``local`` within float tolerance: same batches, same steps, sums in another order inside a site. Updates
leave in the order of site names, so the fold is the same.

| case | result |
|---|---|
| a program that is no functional one, or has dropout | FitError, before any site is asked |
| one site's data are missing or empty, or its training diverges | that site is refused; its chunk goes on |
| an error in the vectorised computation itself | every site of the chunk is lost, with its reason |
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hansa import registry
from hansa.client.batches import num_steps
from hansa.client.functional import EXAMPLES, AnyTree, FunctionalProgram
from hansa.client.work import Memory, begin, encode, finish
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.filter import Filter
from hansa.core.fit import Piece, Trait, check_fit
from hansa.core.ports import Cohort, Handle, Peers, Program, Reply, SecureLine, SiteReport, Work
from hansa.core.strategy import Steps, Strategy
from hansa.core.tree import Array, Parts, Tree
from hansa.core.values import Absence, Plan, Update
from hansa.errors import FitError, HansaError
from hansa.simulation.local import Local
from hansa.workers.memory import MemoryPacks
from hansa.workers.runner import Course, pin_threads

CHUNK_BYTES = 32 << 20
"""What a chunk's stacked parameters, gradients, controls and batches may take, about; it then stays in cache."""

COPIES = 6
"""Arrays of the model's size that a site in training needs: parameters, gradient, their successors, a control."""

SEGMENT = 8
"""Steps whose batches are gathered at once."""


class Batched:
    """All sites in this process, chunk by chunk.

    Args:
        job: the resolved job.
        directory: the run's folder.
        program: the training code, a :class:`~hansa.client.functional.FunctionalProgram`; built from the job's
            recipe by default.
    """

    needs_all = True

    def __init__(self, job: Job, directory: Path, program: Program | None = None) -> None:
        self._job = job
        self._directory = directory
        self._given = program

    async def __aenter__(self) -> Batched:
        """Build the program.

        Raises:
            FitError: it can't be trained as one computation.
        """
        program: Any = self._given
        if program is None:
            program = await asyncio.to_thread(registry.load("recipes", self._job.recipe.name), self._job)
        self._program = program = functional(program, self._job.recipe.name)
        self._local = await Local(self._job, self._directory, program).__aenter__()
        self._packs = MemoryPacks(self._directory / "memory")
        self._turn = asyncio.Lock()
        self.sites: Sequence[str] = self._local.sites
        self.traits: frozenset[Trait] = program.traits | {Trait.VECTORISED}
        self.peers: Peers = self._local.peers
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Free the program, if it was built here."""
        await self._local.__aexit__(*exception)
        if self._given is None:
            self._program.close()

    async def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        return await self._local.initial()

    async def inspect(self, site: str) -> SiteReport:
        """Check one site's data against the job."""
        return await self._local.inspect(site)

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        await self._local.export(params, directory)

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at, or nothing."""
        return await self._local.show(params)

    def cohort(self, course: Course) -> BatchedCohort:
        """Return the sites of ``course`` as a workflow sees them."""
        one_by_one = self._local.cohort(course)
        errors = self._directory / "errors"
        return BatchedCohort(self._job, self._program, self._packs, course, one_by_one, self._turn, errors)


class BatchedCohort:
    """The port of the ``batched`` engine."""

    def __init__(
        self,
        job: Job,
        program: FunctionalProgram,
        packs: MemoryPacks,
        course: Course,
        one_by_one: Cohort,
        turn: asyncio.Lock,
        errors: Path,
    ) -> None:
        self.sites: Sequence[str] = course.sites
        self._job = job
        self._program = program
        self._packs = packs
        self._course = course
        self._one_by_one = one_by_one
        self._turn = turn
        self._errors = errors
        self._strategy, self._filters = course.pieces()

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Carry ``plan`` out at all sites; where they pass the model on among themselves, one after another."""
        if plan.inbox is not None or plan.outbox is not None:
            async for reply in self._one_by_one.ask(plan, sites):
                yield reply
            return
        for chunk in chunks(self._program, plan, sorted(sites)):
            async with self._turn:
                replies = await asyncio.to_thread(self._carry_out, plan, chunk)
            for reply in replies:
                yield reply
        if plan.task == "train":
            await asyncio.to_thread(self._packs.forget, self._course.name)

    def _carry_out(self, plan: Plan, chunk: Sequence[str]) -> list[Update | Absence]:
        pin_threads(self._job.engine.threads)
        if plan.task == "evaluate":
            return evaluate_many(self._program, plan, chunk)
        accepted = {site: plan.acknowledged[site] for site in chunk if site in plan.acknowledged}
        memories = self._packs.load(self._course.name, accepted)
        try:
            done = list(perform_many(self._program, self._strategy, self._filters, plan, chunk, memories))
        except Exception as error:  # noqa: BLE001 - what fails in one chunk must not end the job
            return [Absence(site, "lost", self._log(plan, chunk, error)) for site in chunk]
        kept = {reply.site: memory for reply, memory in done if isinstance(reply, Update)}
        self._packs.save(self._course.name, plan.round, kept, accepted)
        return [reply for reply, _ in done]

    def _log(self, plan: Plan, chunk: Sequence[str], error: Exception) -> str:
        self._errors.mkdir(parents=True, exist_ok=True)
        path = self._errors / f"{plan.job}.{chunk[0]}.{plan.round:06d}.txt"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f"{type(error).__name__}: {error} (traceback in {path})"

    def late(self, round: int) -> Sequence[Handle]:
        """Return nothing: all sites of a chunk end at the same moment."""
        return self._one_by_one.late(round)

    @property
    def secure(self) -> SecureLine | None:
        """None: sites that are one computation have nothing of their own to mask."""
        return None

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return self._program.summarise(sums)


def functional(program: Program, name: str) -> FunctionalProgram:
    """Return ``program`` if many sites of it can be trained as one computation.

    Raises:
        FitError: they can't.
    """
    engine = Piece("engine", "batched", frozenset({Trait.VECTORISED}))
    check_fit([engine, Piece("recipe", name, program.traits)])
    if not isinstance(program, FunctionalProgram):
        raise FitError(
            f"engine 'batched' does not compose with recipe {name!r}: its program is no FunctionalProgram "
            "(hansa.client.functional). Instead: use engine 'local' or 'processes'."
        )
    return program


def chunks(program: FunctionalProgram, plan: Plan, sites: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the sites in order, as many at a time as ``CHUNK_BYTES`` allow, at least one."""
    chunk: list[str] = []
    taken = 0
    model = COPIES * trees.num_bytes(plan.params)
    for site in sites:
        try:
            rows = program.examples(site).train
        except HansaError:
            need = model  # refused when its turn comes
        else:
            batch = min(program.section.batch_size, len(rows[-1])) * SEGMENT
            need = model + batch * sum(a.nbytes // len(a) for a in rows)
        if chunk and taken + need > CHUNK_BYTES:
            yield chunk
            chunk, taken = [], 0
        chunk.append(site)
        taken += need
    if chunk:
        yield chunk


def perform_many(
    program: FunctionalProgram,
    strategy: Strategy,
    pieces: Sequence[Filter],
    plan: Plan,
    sites: Sequence[str],
    memories: Mapping[str, Memory],
) -> Iterator[tuple[Update | Absence, Memory]]:
    """Do one plan at many sites as one computation: what :func:`hansa.client.work.perform` does at one.

    Yields:
        for each site, in the order given, its update or why there is none, and its new memory.
    """
    begun = time.perf_counter()
    contexts: dict[str, Parts] = {}
    refused: dict[str, Absence] = {}
    for site in sites:
        try:
            program.examples(site)
        except HansaError as error:
            refused[site] = Absence(site, "refused", error.message)
        else:
            contexts[site] = begin(strategy, plan, memories.get(site, {}))
    works = _train(program, strategy, plan, contexts) if contexts else {}
    seconds = (time.perf_counter() - begun) / len(sites)
    for site in sites:
        memory = memories.get(site, {})
        if site in refused:
            yield refused[site], memory
            continue
        try:
            finished = finish(strategy, plan, site, contexts[site], works[site])
            update, kept = encode(strategy, pieces, plan, site, works[site], finished, memory)
        except HansaError as error:
            yield Absence(site, "refused", error.message), memory
        else:
            yield replace(update, seconds=seconds), kept


def _train(
    program: FunctionalProgram, strategy: Strategy, plan: Plan, contexts: Mapping[str, Parts]
) -> dict[str, Work]:
    """Train the sites of ``contexts``, which are in the order of their names."""
    f = program.functional
    counts = {site: len(program.examples(site).train[-1]) for site in contexts}
    planned = {site: num_steps(program.section, counts[site]) for site in contexts}
    sites = sorted(contexts, key=lambda site: -planned[site])  # those that end first are the last rows
    start = program.lifted(trees.floating(plan.params))
    context, context_axes = _stacked(program, strategy, [contexts[site] for site in sites])
    params: AnyTree = {name: leaf.expand(len(sites), *leaf.shape) for name, leaf in start.items()}
    machine = _Machine(program, strategy, context_axes)
    state = machine.init(params)
    sums: dict[str, Array] = {}
    seen = np.zeros(len(sites))
    finished: list[Tree] = []
    for batch, mask, rows in _steps(program, plan, sites, [planned[site] for site in sites]):
        active = len(rows)
        if active < len(next(iter(params.values()))):
            finished.append({name: f.lower(leaf[active:]) for name, leaf in params.items()})
            params, state = machine.cut((params, state), active)
            context = machine.cut_context(context, active)
        params, state, part = machine.step(params, state, context, batch, mask)
        seen[:active] += rows
        for name, values in part.items():
            sums.setdefault(name, np.zeros(len(sites)))[:active] += f.lower(values)
    finished.append({name: f.lower(leaf) for name, leaf in params.items()})
    trained = {name: np.concatenate([tree[name] for tree in reversed(finished)]) for name in start}
    lr = program.local_optimizer.lr
    return {
        site: Work(
            params={**plan.params, **{name: leaf[row] for name, leaf in trained.items()}},
            num_examples=counts[site],
            steps=Steps(planned[site], planned[site] * lr),
            sums={**{name: float(values[row]) for name, values in sums.items()}, EXAMPLES: float(seen[row])},
        )
        for row, site in enumerate(sites)
    }


def _stacked(
    program: FunctionalProgram, strategy: Strategy, contexts: Sequence[Parts]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int | None]]]:
    """Return the sites' contexts as one, and for each leaf 0 if it has a row a site, None if all share it."""
    context: dict[str, dict[str, Any]] = {}
    axes: dict[str, dict[str, int | None]] = {}
    if strategy.rule.adjust is None:
        return context, axes
    for part, tree in contexts[0].items():
        context[part], axes[part] = {}, {}
        for name, leaf in tree.items():
            shared = all(other[part][name] is leaf for other in contexts)
            axes[part][name] = None if shared else 0
            array = leaf if shared else np.stack([other[part][name] for other in contexts])
            context[part][name] = program.functional.lift(array)
    return context, axes


class _Machine:
    """The local step of a program under a strategy, mapped over the leading axis of its arguments."""

    def __init__(
        self, program: FunctionalProgram, strategy: Strategy, axes: Mapping[str, Mapping[str, int | None]]
    ) -> None:
        import torch

        self._optimizer = program.local_optimizer
        self._axes = axes

        def step(params: Any, state: Any, context: Any, batch: Any, mask: Any) -> Any:
            return program.step(self._optimizer, strategy.rule.adjust, params, state, context, batch, mask)

        self._vmap = torch.func.vmap
        self._step = step

    def init(self, params: AnyTree) -> Any:
        """Return one optimiser state a row."""
        state = self._optimizer.init(params)
        return self._vmap(self._optimizer.init)(params) if state else state

    def step(self, params: AnyTree, state: Any, context: Any, batch: Any, mask: Any) -> Any:
        """Make one step in every row."""
        masked = None if mask is None else 0
        return self._vmap(self._step, in_dims=(0, 0 if state else None, self._axes, 0, masked))(
            params, state, context, batch, mask
        )

    def cut(self, tree: Any, rows: int) -> Any:
        """Return the first ``rows`` rows of every leaf."""
        if isinstance(tree, tuple):
            return tuple(self.cut(each, rows) for each in tree)
        if isinstance(tree, Mapping):
            return {name: self.cut(each, rows) for name, each in tree.items()}
        return tree[:rows]

    def cut_context(self, context: Any, rows: int) -> Any:
        """Return the first ``rows`` rows of every leaf that is not shared."""
        return {
            part: {name: leaf if self._axes[part][name] is None else leaf[:rows] for name, leaf in tree.items()}
            for part, tree in context.items()
        }


def _steps(
    program: FunctionalProgram, plan: Plan, sites: Sequence[str], planned: Sequence[int]
) -> Iterator[tuple[tuple[Any, ...], Any, NDArray[np.int64]]]:
    """Yield for each step the stacked batch, its mask (None where nothing is padded) and each site's row count.

    ``planned`` falls; the sites of a step are those of the first rows that have a step left.
    """
    f = program.functional
    data = [program.examples(site).train for site in sites]
    batches = [program.batches(site, plan) for site in sites]
    width = max(min(program.section.batch_size, len(arrays[-1])) for arrays in data)
    for first in range(0, planned[0], SEGMENT):
        last = min(first + SEGMENT, planned[0])
        here = [site for site, steps in enumerate(planned) if steps > first]
        rows = np.zeros((last - first, len(here)), np.int64)
        gathered = [np.zeros((last - first, len(here), width, *array.shape[1:]), array.dtype) for array in data[0]]
        for site in here:
            picks = list(islice(batches[site], min(last, planned[site]) - first))
            index = np.zeros((len(picks), width), np.int64)
            for step, pick in enumerate(picks):
                index[step, : len(pick)] = pick
                rows[step, site] = len(pick)
            for target, array in zip(gathered, data[site], strict=True):
                target[: len(picks), site] = array[index]
        for step in range(last - first):
            active = int((rows[step] > 0).sum())
            filled = rows[step, :active]
            mask = None
            if (filled < width).any():
                mask = f.lift((np.arange(width) < filled[:, None]).astype(np.float32))
            yield tuple(f.lift(array[step, :active]) for array in gathered), mask, filled


def evaluate_many(program: FunctionalProgram, plan: Plan, sites: Sequence[str]) -> list[Update | Absence]:
    """Evaluate ``plan.params`` on the held-out rows of many sites in one pass.

    Returns:
        for each site, in the order given, its metric sums or why there are none.
    """
    begun = time.perf_counter()
    found: list[tuple[str, tuple[Array, ...] | None]] = []
    replies: dict[str, Update | Absence] = {}
    for site in sites:
        try:
            found.append((site, program.examples(site).test))
        except HansaError as error:
            replies[site] = Absence(site, "refused", error.message)
    sums = _judge(program, plan, {site: arrays for site, arrays in found if arrays and len(arrays[-1])})
    seconds = (time.perf_counter() - begun) / len(sites)
    for site, _ in found:
        values = sums.get(site, {})
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            reason = f"The evaluation's {broken[0]} is {values[broken[0]]}: the model has diverged."
            replies[site] = Absence(site, "refused", reason)
        else:
            replies[site] = Update(site, plan.round, plan.version, {}, 1.0, values, 1.0, seconds)
    return [replies[site] for site in sites]


def _judge(
    program: FunctionalProgram, plan: Plan, data: Mapping[str, tuple[Array, ...]]
) -> dict[str, dict[str, float]]:
    if not data:
        return {}
    f = program.functional
    params = program.lifted(trees.floating(plan.params))
    joined = tuple(map(np.concatenate, zip(*data.values(), strict=True)))
    total = len(joined[-1])
    width = program.section.eval_batch_size * max(1, math.isqrt(len(data)))
    columns: dict[str, Array] = {}
    for start in range(0, total, width):
        batch = tuple(f.lift(array[start : start + width]) for array in joined)
        for name, values in f.rows(params, batch).items():
            columns.setdefault(name, np.zeros(total))[start : start + width] = values
    counts = [len(arrays[-1]) for arrays in data.values()]
    starts = np.cumsum([0, *counts[:-1]])
    sums = {name: np.add.reduceat(column, starts) for name, column in columns.items()}
    return {
        site: {**{name: float(values[place]) for name, values in sums.items()}, EXAMPLES: float(counts[place])}
        for place, site in enumerate(data)
    }
