# SPDX-License-Identifier: Apache-2.0
"""``hansa check``: everything that can be known of a job without training."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hansa import registry
from hansa.cli import console
from hansa.core import config
from hansa.core import filter as filters
from hansa.core import tree as trees
from hansa.core.config import HomomorphicEncryptionSection, Job
from hansa.core.fit import Conflict, Piece, Trait
from hansa.core.ports import SiteReport
from hansa.core.strategy import Steps, Strategy
from hansa.core.tree import Tree
from hansa.core.values import Model, Update
from hansa.errors import FitError, HansaError, PrivacyError
from hansa.privacy.plan import NOT_COVERED, PrivacyPlan, terms_of_job
from hansa.runs.carrier import promise, refusal
from hansa.runs.engine import inspect_all
from hansa.runs.masking import settled, told
from hansa.runs.pieces import misfits, pieces_of
from hansa.secagg.ranges import ring_of
from hansa.simulation.engines import open_engine
from hansa.sinks.text import size
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import expected, wanted
from hansa.workflows.secure import bounds_of


@dataclass(frozen=True)
class Costs:
    """What a round sends and what the server keeps, in bytes of tensors.

    Attributes:
        asked: sites a round.
        down, up: sent to and by one site.
        model: the shared parameters as the server keeps them (at least float32).
        state: the strategy's state.
        sums: the accumulator; mapped from a file where it is large.
        memory: what the server's part needs at its peak: the model before and after the step, twice the state, sums.
        checkpoints: all checkpoints on disk.
        waiting: updates that wait on disk for their turn, at most.
        error: by how much an element of the encrypted sum of weighed updates may be off, at most; None without one.
        encrypting_s: to encrypt one update, about, on one core.
    """

    asked: int
    down: int
    up: int
    model: int
    state: int
    sums: int
    memory: int
    checkpoints: int
    waiting: int
    error: float | None = None
    encrypting_s: float | None = None


@dataclass(frozen=True)
class Findings:
    """What a check found."""

    job: Job
    sites: Sequence[SiteReport]
    refused: Mapping[str, HansaError]
    pieces: Sequence[Piece]
    conflicts: Sequence[Conflict]
    costs: Costs | None
    privacy: PrivacyPlan | PrivacyError | None
    unfit: FitError | None
    masks: str

    @property
    def error(self) -> HansaError | None:
        """Why the job can't run, if it can't."""
        if self.conflicts:
            return FitError("\n".join(str(conflict) for conflict in self.conflicts), job=self.job.name)
        if isinstance(self.privacy, PrivacyError):
            return self.privacy
        return self.unfit or refusal(self.job, len(self.sites), self.refused)


def check(path: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Check a job file and say what was found.

    Raises:
        HansaError: of the kind that says why the job can't run.
    """
    job = config.load(path, overrides)
    with tempfile.TemporaryDirectory(prefix="hansa-check-") as folder:
        found = asyncio.run(_find(job, Path(folder)))
    if as_json and found.error is None:
        console.emit(_document(found))
    elif not as_json:
        _tell(console.out(), found)
    if found.error is not None:
        raise found.error


async def _find(job: Job, folder: Path) -> Findings:
    async with open_engine(job, folder) as engine:
        job = settled(job, len(engine.sites))
        plain = Course(job.name, tuple(engine.sites), job.strategy, tuple(job.filters))
        pieces = pieces_of(job, engine.traits, plain)
        reports, refused = await inspect_all(engine)
        found = misfits(job, engine.traits, plain)
        if found:
            return Findings(job, reports, refused, pieces, found, None, None, None, "")
        privacy: PrivacyPlan | PrivacyError | None
        unfit, masks = None, ""
        try:
            masks = told(job, len(engine.sites))
            privacy = promise(job, len(engine.sites), reports)
            course = replace(plain, terms=terms_of_job(job))
            costs = None if refused or not reports else estimate(job, course, pieces, await engine.initial())
        except PrivacyError as error:
            privacy, costs = error, None
        except FitError as error:
            unfit, costs = error, None
    return Findings(job, reports, refused, pieces, found, costs, privacy, unfit, masks)


def estimate(job: Job, course: Course, pieces: Sequence[Piece], initial: Tree) -> Costs:
    """Compute what a round sends and what the server keeps, by taking an update of zeros through the filters."""
    strategy, chosen = course.pieces()
    initial = trees.lazily(initial)
    model = Model.start(initial)
    state = strategy.init(model)
    sent = strategy.sent(state)
    context = strategy.rule.begin(initial, sent, {})
    parts, _ = strategy.rule.finish(context, initial, initial, Steps(1, job.train.lr))
    update = Update(course.sites[0], 1, 0, parts, 1.0, {})
    update, _ = filters.run(chosen, update, filters.Given(strategy.weighed, sent), {})
    kept = trees.num_bytes(model.params)
    kept_state = sum(trees.num_bytes(tree) for tree in state.values())
    sums = len(strategy.weighed) * trees.num_bytes(trees.floating(model.params))
    down = trees.num_bytes(initial) + sum(trees.num_bytes(tree) for tree in sent.values())
    up = update.header.num_bytes
    if any(Trait.RELAYS in piece.traits for piece in pieces):
        down = up = trees.num_bytes(initial)
    asked = min(wanted(job.cohort.sample, len(course.sites)), len(course.sites))
    seconds = error = None
    if job.masks is not None and strategy.combine is None:
        layouts = expected(strategy, initial)
        shapes = {part: {name: spec.shape for name, spec in layout.items()} for part, layout in layouts.items()}
        bounds = bounds_of(job.masks, course.terms, asked)
        up = ring_of(job.masks, bounds, asked, shapes, strategy.weighed).num_bytes
    if job.homomorphic_encryption is not None:
        up, seconds, error = _encrypted(job.homomorphic_encryption, course, asked, strategy, initial)
    return Costs(
        asked=asked,
        down=down,
        up=up,
        model=kept,
        state=kept_state,
        sums=sums,
        memory=2 * (kept + kept_state) + sums,
        checkpoints=(job.output.keep + 2) * (kept + kept_state),
        waiting=asked * (up if strategy.combine is None else up + sums),
        error=error,
        encrypting_s=seconds,
    )


def _encrypted(
    section: HomomorphicEncryptionSection, course: Course, asked: int, strategy: Strategy, initial: Tree
) -> tuple[int, float, float]:
    """Return the bytes of an encrypted update, the seconds that it takes to make, and the error in a sum of them.

    Raises:
        PrivacyError: no ciphertext holds the sum.
        FitError: the job allows no update of that size.
    """
    layouts = expected(strategy, initial)
    shapes = {part: {name: spec.shape for name, spec in layout.items()} for part, layout in layouts.items()}
    sites = course.sites[: max(asked, section.minimum)]
    terms_of = registry.load_object("hansa.homomorphic.agreement:terms")
    bounds = bounds_of(section, course.terms, len(sites))
    encoding = terms_of(section, bounds, course.name, 2, 1, sites, shapes, strategy.weighed).encoding
    cost = registry.load_object("hansa.homomorphic.agreement:cost")(encoding.size)
    error = max(encoding.error(part, name) for part, tree in shapes.items() for name in tree)
    return cost.num_bytes, cost.seconds, error


def _document(found: Findings) -> dict[str, Any]:
    costs = found.costs
    return {
        "ok": True,
        "job": found.job.model_dump(mode="json"),
        "sites": [asdict(site) for site in found.sites],
        "pieces": [
            {"family": p.family, "name": p.name, "traits": sorted(t.name.lower() for t in p.traits)}
            for p in found.pieces
        ],
        "costs": asdict(costs) if costs else None,
        "secure_aggregation": found.masks,
        "privacy": found.privacy.as_json() if isinstance(found.privacy, PrivacyPlan) else None,
    }


def _tell(to: Console, found: Findings) -> None:
    to.print(Text("The resolved job", "bold"))
    to.print(Text(found.job.to_json()), soft_wrap=True)
    to.print()
    if found.sites:
        to.print(_site_table(found.sites))
    to.print(_piece_table(found.pieces))
    if found.costs:
        to.print(_cost_table(found.costs))
    if isinstance(found.privacy, PrivacyPlan):
        to.print(_privacy_table(found.privacy))
        for warning in found.privacy.warnings:
            to.print(Text(warning, "yellow"))
    if found.masks:
        to.print(Text(found.masks), soft_wrap=True)
    if found.error is None:
        to.print(Text("The pieces compose and every site can take part.", "green"))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, header_style="dim")


def _site_table(sites: Sequence[SiteReport]) -> Table:
    table = _table(f"{len(sites)} sites")
    kinds = list(dict.fromkeys(kind for site in sites for kind in site.counts))
    table.add_column("site")
    for kind in kinds:
        table.add_column(kind, justify="right")
    labelled = any(site.labels for site in sites)
    if labelled:
        table.add_column("labels", overflow="fold")
    for site in sites:
        cells = [f"{site.counts[kind]:,}" if kind in site.counts else "" for kind in kinds]
        labels = ", ".join(f"{label} {count:,}" for label, count in site.labels.items() if count)
        table.add_row(Text(site.site), *cells, *([Text(labels)] if labelled else []))
    return table


def _piece_table(pieces: Sequence[Piece]) -> Table:
    table = _table("What it is made of")
    for title in ("piece", "name", "what matters for the fit"):
        table.add_column(title)
    for piece in pieces:
        traits = "; ".join(sorted(trait.value for trait in piece.traits))
        table.add_row(piece.family, Text(piece.name), Text(traits or "–"))
    return table


def _privacy_table(plan: PrivacyPlan) -> Table:
    table = _table(f"What it promises, at δ = {plan.terms.section.delta:g}")
    for title in ("against", "ε", "because"):
        table.add_column(title)
    for claim in plan.claims:
        shown = "none" if claim.epsilon is None else f"{claim.epsilon:.3g}"
        table.add_row(claim.adversary, Text(shown, "bold"), claim.because)
    table.add_section()
    table.add_row("hidden", "", plan.unit)
    table.add_row("neighbours", "", plan.neighbours)
    table.add_row("sampling", "", plan.sampling)
    table.add_row("noise", "", f"{plan.terms.noise_multiplier:.4g} times the clip of {plan.terms.section.clip:g}")
    table.add_row("not covered", "", "; ".join(NOT_COVERED))
    return table


def _cost_table(costs: Costs) -> Table:
    table = Table(title="What it costs, in bytes of tensors", title_justify="left", title_style="bold", box=box.SIMPLE)
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    table.add_row("to one site, a round", size(costs.down))
    table.add_row("from one site, a round", size(costs.up))
    table.add_row(f"a round of {costs.asked} sites, both ways", size(costs.asked * (costs.down + costs.up)))
    table.add_row("memory of the server's part, about", size(costs.memory))
    table.add_row("disk for checkpoints", size(costs.checkpoints))
    table.add_row("disk for updates that wait, at most", size(costs.waiting))
    if costs.encrypting_s is not None:
        table.add_row("time to encrypt an update, about", f"{costs.encrypting_s:.2g} s")
    if costs.error is not None:
        table.add_row("error of an element of the sum, at most", f"{costs.error:.2g}")
    return table
