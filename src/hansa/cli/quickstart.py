# SPDX-License-Identifier: Apache-2.0
"""``hansa quickstart``: pre-train a small model, fine-tune it over sites, and show what that was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hansa import registry
from hansa.cli import console, live, running
from hansa.core import config
from hansa.core.config import Job
from hansa.errors import InterruptedRunError, JobError
from hansa.runs.progress import Progress
from hansa.runs.run import Run
from hansa.sinks.summary import TITLES, Summary, summary
from hansa.sinks.text import duration, number, size

if TYPE_CHECKING:
    from hansa.recipes.quickstart import Base, Corpora


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    Attributes:
        base: a causal language model on disk; None to pre-train one.
        data: a JSONL file in place of the standard library's source text.
        by: the column of ``data`` whose values are the sites.
        text: the column of ``data`` that holds the text.
        seed: the first seed.
        seeds: how many seeds are run, one after another.
        overrides: ``a.b=value`` changes to the job.
    """

    base: Path | None
    data: Path | None
    by: str | None
    text: str
    seed: int
    seeds: int
    overrides: Sequence[str]


def quickstart(wish: Wish, *, as_json: bool) -> None:
    """Do all three stages and tell what came out.

    Raises:
        HansaError: of the kind that says what went wrong.
    """
    if (wish.data is None) != (wish.by is None):
        raise JobError("--data and --by go together: a JSONL file, and its column whose values are the sites.")
    jobs = [_changed(job, wish.overrides) for job in _jobs(wish)]
    finished = [running.carry_out(job) for job in jobs]
    if as_json:
        documents = [running.document(run) for run in finished]
        console.emit(documents[0] if wish.seeds == 1 else {"runs": documents, "mean": _means(finished)})
        return
    to = console.out()
    running.tell(to, finished[-1])
    if len(finished) > 1:
        to.print()
        to.print(_seed_table(jobs, finished))
    _suggest(to, finished[-1].directory)


def _changed(job: Job, overrides: Sequence[str]) -> Job:
    return config.parse(config.override(job.model_dump(mode="json"), overrides)) if overrides else job


def _jobs(wish: Wish) -> list[Job]:
    """Make base and data, and return the job of every seed."""
    registry.load_object("hansa.recipes.quickstart:job")  # says which extra is missing, if one is
    from hansa.recipes import quickstart as recipe

    seeds = range(wish.seed, wish.seed + wish.seeds)
    try:
        with live.shown(console.err()) as progress:
            base = wish.base
            corpora: Corpora | None = None
            if base is None or wish.data is None:
                progress.stage("reading the standard library's source text", 0)
                corpora = recipe.gather()
            if base is None:
                assert corpora is not None, "it was gathered above"
                base = _pretrained(corpora, progress).directory
            if wish.data is not None and wish.by is not None:
                return [
                    recipe.job_for_base(base, wish.data, key=wish.by, column=wish.text, seed=seed) for seed in seeds
                ]
            assert corpora is not None, "it was gathered above"
            files = recipe.write_sites(corpora)
            return [recipe.job(base, files, seed=seed) for seed in seeds]
    except KeyboardInterrupt:
        raise InterruptedRunError("Stopped. Pre-training begins anew next time.") from None


def _pretrained(corpora: Corpora, progress: Progress) -> Base:
    from hansa.recipes import quickstart as recipe

    begun = False

    def told(done: int, total: int, loss: float) -> None:
        nonlocal begun
        if not begun:
            progress.stage("pre-training the base model", total, done - 1)
            begun = True
        progress.advance(f"loss {number(loss)} nats a byte")

    base = recipe.pretrained(corpora, told)
    how = f"made earlier in {duration(base.seconds)}" if base.cached else f"loss {number(base.loss)} nats a byte"
    progress.say(f"Base model: {base.directory} ({how}, {size(base.num_bytes)} of public source text)")
    return base


def _means(finished: Sequence[Run]) -> dict[str, Any]:
    """Return row -> column -> mean over seeds."""
    found = [each for run in finished if (each := summary(run.report)) is not None]
    return {
        name: {column: fmean(values) for column in ("own", "everyone") if (values := _values(found, name, column))}
        for name in TITLES
    }


def _values(found: Sequence[Summary], name: str, column: str) -> list[float]:
    values = [getattr(row, column) for each in found if (row := each.row(name)) is not None]
    return [value for value in values if value is not None]


def _seed_table(jobs: Sequence[Job], finished: Sequence[Run]) -> Table:
    found = [each for run in finished if (each := summary(run.report)) is not None]
    seeds = ", ".join(str(job.seed) for job in jobs)
    table = Table(title=f"{found[0].metric}, mean ± standard deviation over seeds {seeds}", box=box.SIMPLE)
    table.title_justify = "left"
    for title in ("model", "sites' own", "everyone's"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, title in TITLES.items():
        cells = []
        for column in ("own", "everyone"):
            values = _values(found, name, column)
            cells.append(f"{number(fmean(values))} ± {stdev(values):.2g}" if len(values) > 1 else "")
        if any(cells):
            table.add_row(title, *cells)
    return table


def _suggest(to: Console, directory: Path) -> None:
    lines: Mapping[str, str] = {
        "try the model": f"AutoModelForCausalLM.from_pretrained('{directory / 'model'}')",
        "your own base": "hansa quickstart --base MODEL_DIR --data FILE.jsonl --by COLUMN",
        "your own job": "hansa init job.toml",
    }
    for title, command in lines.items():
        to.print(Text.assemble((f"  {title:<14} ", "dim"), command), soft_wrap=True)
