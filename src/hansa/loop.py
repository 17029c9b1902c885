# SPDX-License-Identifier: Apache-2.0
"""A federation as a value and a function, for a researcher's own loop.

    process = hansa.process(model_fn, hansa.fedavg, client_optimizer=hansa.sgd(0.1), loss=F.cross_entropy)
    state = process.initialize()
    for _ in range(10):
        state, metrics = process.next(state, {"berlin": (x, y), "lyon": (x, y)})

A state is never changed, so it can be kept, compared, and gone on from twice. Rounds are those of
:func:`hansa.workflows.scatter_gather.scatter_gather`: the same strategies, filters, fold and fit check as a job's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hansa.client.functional import Examples, Functional, FunctionalProgram, Metric, of_torch
from hansa.client.work import Memory, perform
from hansa.core import config
from hansa.core.config import Job, TrainSection
from hansa.core.filter import Filter
from hansa.core.fit import Piece, Trait, check_fit
from hansa.core.optimizer import Optimizer
from hansa.core.ports import Handle, Reply, SecureLine
from hansa.core.strategy import Strategy
from hansa.core.tree import Tree
from hansa.core.values import Absence, Model, Plan, RoundRecord, Snapshot, Update
from hansa.errors import HansaError, JobError
from hansa.simulation.batched import chunks, evaluate_many, functional, perform_many
from hansa.strategies.fedavg import averaging
from hansa.workers.runner import Course
from hansa.workflows.evaluate import evaluate
from hansa.workflows.scatter_gather import scatter_gather

if TYPE_CHECKING:
    from torch import nn

FederatedData = Mapping[str, tuple[Any, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """A federation between two rounds.

    Attributes:
        snapshot: model, strategy state, and which round's work was last accepted from each site.
        memories: what each site keeps (SCAFFOLD's controls).
        record: what happened in the round that led here; None before the first.
    """

    snapshot: Snapshot
    memories: Mapping[str, Memory] = field(default_factory=dict)
    record: RoundRecord | None = None

    @property
    def round(self) -> int:
        """The number of rounds made."""
        return self.snapshot.round

    @property
    def params(self) -> Tree:
        """The shared parameters, name -> array, in native dtypes."""
        return self.snapshot.model.native()


@dataclass(frozen=True)
class Process:
    """What :func:`process` returns."""

    functional: Functional
    strategy: Strategy
    filters: tuple[Filter, ...]
    client_optimizer: Optimizer
    section: TrainSection
    job: Job

    def initialize(self) -> State:
        """Return the state before the first round."""
        model = Model.start(self.functional.params)
        return State(Snapshot(0, model, self.strategy.init(model)))

    def next(self, state: State, federated_data: FederatedData) -> tuple[State, dict[str, float]]:
        """Make one round; works inside a running event loop too.

        Args:
            state: where to go on from; it stays as it is.
            federated_data: site -> arrays of its training rows with the same first axis, targets last. It names
                every site of the federation: which of them take part is ``sample``'s to say.

        Returns:
            the next state, and the round's metrics: ``train_loss`` (mean over the rows trained on) and the
            ``train_`` form of every other metric.

        Raises:
            DataError: there are no sites.
            QuorumError: too few sites could do their part; it names each and its reason.
        """
        sites = self._sites(state, {site: Examples(arrays) for site, arrays in federated_data.items()})
        job = self.job.model_copy(update={"rounds": state.round + 2})  # the last round of a job is always evaluated
        record = _wait(_first(scatter_gather(job, self.strategy, sites, state.snapshot)))
        kept = {site: memory for site, memory in state.memories.items() if site in record.acknowledged}
        kept |= {site: sites.made[site] for site in record.accepted if site in record.acknowledged}
        snapshot = Snapshot(record.round, record.model, record.state, record.acknowledged)
        return State(snapshot, kept, record), dict(record.metrics)

    def evaluate(self, state: State, federated_data: FederatedData) -> dict[str, float]:
        """Return the metrics of the state's model over all rows of all sites.

        Raises:
            QuorumError: no site could evaluate it.
        """
        data = {site: Examples(arrays, arrays) for site, arrays in federated_data.items()}
        sites = self._sites(state, data)
        scores = _wait(evaluate(sites, state.snapshot.model, job=self.job.name, round=state.round, seed=self.job.seed))
        return dict(scores.overall)

    def _sites(self, state: State, data: Mapping[str, Examples]) -> _Sites:
        if not data:
            raise JobError("federated_data names no site.")
        program = FunctionalProgram(self.functional, data, self.section, self.client_optimizer)
        batched = self.job.engine.name == "batched"
        return _Sites(program, self.strategy, self.filters, state.memories, batched)


class _Sites:
    """The sites of one round, in this process and in memory, as a workflow sees them."""

    def __init__(
        self,
        program: FunctionalProgram,
        strategy: Strategy,
        filters: Sequence[Filter],
        memories: Mapping[str, Memory],
        batched: bool,
    ) -> None:
        self.sites: Sequence[str] = program.sites
        self.made: dict[str, Memory] = {}
        self._program = program
        self._strategy = strategy
        self._filters = filters
        self._memories = memories
        self._batched = batched

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Carry ``plan`` out at each site, or at many as one computation."""
        if not self._batched:
            for site in sorted(sites):
                yield self._one(plan, site)
            return
        for chunk in chunks(self._program, plan, sorted(sites)):
            if plan.task == "evaluate":
                for reply in evaluate_many(self._program, plan, chunk):
                    yield reply
                continue
            for reply, memory in perform_many(
                self._program, self._strategy, self._filters, plan, chunk, self._memories
            ):
                self.made[reply.site] = memory
                yield reply

    def _one(self, plan: Plan, site: str) -> Update | Absence:
        memory = self._memories.get(site, {})
        try:
            update, self.made[site], _ = perform(self._program, self._strategy, self._filters, plan, site, memory)
        except HansaError as error:
            return Absence(site, "refused", error.message)
        return update

    def late(self, round: int) -> Sequence[Handle]:
        """Return nothing: there is no deadline."""
        return ()

    @property
    def secure(self) -> SecureLine | None:
        """None: there is no way for such messages here."""
        return None

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return self._program.summarise(sums)


def process(
    model_fn: Callable[[], nn.Module | Functional],
    strategy: Strategy | Callable[[], Strategy],
    *,
    client_optimizer: Optimizer,
    server_optimizer: Optimizer | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    clip_grad: float | None = None,
    filters: Sequence[Filter] = (),
    sample: float = 1.0,
    quorum: float = 1.0,
    seed: int = 0,
    engine: Literal["local", "batched"] = "local",
) -> Process:
    """Return a federation as ``initialize() -> state`` and ``next(state, data) -> (state, metrics)``.

    Args:
        model_fn: makes the model: a torch module (its initial parameters follow ``seed``), or a
            :class:`~hansa.client.functional.Functional`, such as :func:`~hansa.client.functional.of_numpy` makes.
        strategy: the algorithm, or its builder with all options left at their defaults.
        client_optimizer: the optimiser of local steps; it starts afresh in every round.
        server_optimizer: in place of plain averaging, for strategies that average (fedavg, fedprox).
        loss: for a torch module, ``(outputs, targets) -> one value a row``, or one of torch's own losses.
        metrics: for a torch module, further ``(outputs, targets) -> one value a row``.
        steps: local steps a round.
        epochs: or passes over a site's rows; one by default.
        batch_size: rows a step.
        clip_grad: the norm that a local gradient is clipped to.
        filters: transforms of an update, in order; the weighing that every federation has is added.
        sample: the share of sites asked in a round, or their number if above 1.
        quorum: the share, or number, of those asked that must answer.
        seed: of initial parameters, cohorts and batches.
        engine: ``local`` trains the sites one after another, ``batched`` many as one computation (torch only).

    Raises:
        JobError: a value is out of range, the loss is missing, or the strategy has a server step of its own.
        FitError: the pieces do not compose.
    """
    job = config.parse(
        {
            "name": "process",
            "recipe": "functional",
            "seed": seed,
            "train": {"steps": steps, "epochs": epochs, "batch_size": batch_size, "clip_grad": clip_grad},
            "cohort": {"sample": sample, "quorum": quorum},
            "engine": {"name": engine},
            "evaluation": {"every": 0},
        }
    )
    value = strategy if isinstance(strategy, Strategy) else strategy()
    if server_optimizer:
        value = _served(value, server_optimizer)
    made = _functional(model_fn, loss, metrics, seed)
    _, pieces = Course(job.name, (), value, tuple(filters)).pieces()
    program = FunctionalProgram(made, {}, job.train, client_optimizer)
    if engine == "batched":
        functional(program, "process")
    adaptive = frozenset() if client_optimizer.plain else frozenset({Trait.ADAPTIVE_STEPS})
    check_fit(
        [
            Piece("strategy", value.name, value.traits),
            *([Piece("rule", value.combine.name, frozenset({Trait.NEEDS_EACH}))] if value.combine else []),
            *(Piece("filter", piece.name, piece.traits) for piece in pieces),
            Piece("client_optimizer", client_optimizer.name, adaptive),
        ]
    )
    return Process(made, value, tuple(pieces), client_optimizer, job.train, job)


def _served(strategy: Strategy, optimizer: Optimizer) -> Strategy:
    """Return an averaging strategy with ``optimizer`` in place of its plain mean."""
    if Trait.SERVER_STEP in strategy.traits:
        raise JobError(
            f"server_optimizer does not go with {strategy.name!r}, which has a server step of its own. Set that "
            "strategy's own options (lr, momentum, ...), or give server_optimizer with fedavg or fedprox."
        )
    half = averaging(strategy.name, optimizer)
    traits = strategy.traits | (half.traits & {Trait.SERVER_STEP})
    return replace(strategy, init=half.init, step=half.step, traits=traits)


def _functional(
    model_fn: Callable[[], nn.Module | Functional],
    loss: Callable[[Any, Any], Any] | None,
    metrics: Mapping[str, Metric] | None,
    seed: int,
) -> Functional:
    made = model_fn() if "torch" not in sys.modules else None
    if isinstance(made, Functional):
        return made
    from hansa.client.torch import seeded

    with seeded(seed, "initial"):
        made = model_fn()
    if isinstance(made, Functional):
        return made
    if loss is None:
        raise JobError("A torch module needs a loss: hansa.process(..., loss=torch.nn.functional.cross_entropy).")
    return of_torch(made, loss, metrics)


async def _first(records: AsyncIterator[RoundRecord]) -> RoundRecord:
    async with contextlib.aclosing(records) as rounds:  # type: ignore[type-var]
        return await anext(rounds)


def _wait(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; a thread of its own runs it where this one has a running event loop."""
    found: list[T] = []

    async def keep() -> None:  # asyncio.run takes the repr of what its task returns, whole models included
        found.append(await work)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(keep())
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, keep()).result()
    return found[0]
