# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run works: a live screen on a terminal, one line a round elsewhere. All on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.ports import Reply
from hansa.core.values import TRAINING, Absence, Plan, RoundRecord
from hansa.runs.progress import Progress
from hansa.sinks.summary import main_metric, mode_of
from hansa.sinks.text import duration, number, size

ABSENT = "yellow"
MOST_ROWS = 14
"""How many sites the live table shows."""


@contextlib.contextmanager
def shown(console: Console, job: Job | None = None) -> Iterator[Progress]:
    """Give what shows progress on ``console``: a live screen where it is a terminal, lines where it is not.

    Args:
        console: where to; stderr, so that results on stdout stay clean.
        job: tells which metric matters, where there are rounds.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines(console, job)
        return
    screen = Screen(console, job)
    with screen.live:
        try:
            yield screen
        except BaseException:  # whatever ends the stage, the screen shows that it failed
            screen.end_stage(failed=True)
            raise
        screen.end_stage()


@dataclass
class _Stage:
    name: str
    total: int
    before: int
    done: int
    detail: str = ""
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def seconds_left(self) -> float | None:
        made = self.done - self.before
        return self.seconds / made * (self.total - self.done) if made and self.total else None

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else ""


@dataclass
class _Row:
    """One site in the live table."""

    doing: str = ""
    style: str = ""
    loss: float | None = None
    metric: float | None = None
    seconds: float | None = None


class _Tally:
    """What is known of a run so far: bytes sent, the last metrics, and whom they are of."""

    def __init__(self, job: Job | None) -> None:
        self._job = job.model_dump(mode="json") if job else None
        self.down = 0
        self.up = 0
        self._now_down = 0
        self._now_up = 0
        self.metrics: Mapping[str, float] = {}
        self.metric: str | None = None
        self.best: float | None = None

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        if plan.task == "train":
            parts = [plan.params, *plan.parts.values()]
            self._now_down += sum(trees.num_bytes(tree) for tree in parts) * len(sites)

    def reply(self, plan: Plan, reply: Reply) -> None:
        if plan.task == "train" and not isinstance(reply, Absence):
            self._now_up += reply.header.num_bytes

    def round(self, record: RoundRecord) -> None:
        self.down += record.bytes_down
        self.up += record.bytes_up
        self._now_down = self._now_up = 0
        self.metrics = {**self.metrics, **record.metrics}
        if self._job is None:
            return
        self.metric = main_metric(self._job, self.metrics)
        if self.metric is not None and self.metric in record.metrics:
            value = record.metrics[self.metric]
            choose = min if mode_of(self._job, self.metric) == "min" else max
            self.best = value if self.best is None else choose(value, self.best)

    @property
    def traffic(self) -> str:
        return f"{size(self.down + self._now_down)} down, {size(self.up + self._now_up)} up"

    def numbers(self, metrics: Mapping[str, float]) -> list[str]:
        shown = []
        if self.metric is not None and self.metric in metrics:
            shown.append(f"{self.metric} {number(metrics[self.metric])}")
        if TRAINING + "loss" in metrics:
            shown.append(f"training loss {number(metrics[TRAINING + 'loss'])}")
        return shown


class Lines:
    """One line a stage and a round, for logs."""

    def __init__(self, console: Console, job: Job | None) -> None:
        self._console = console
        self._tally = _Tally(job)
        self._stage: _Stage | None = None

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage."""
        self._stage = _Stage(name, total, done, done)
        self._print(f"{name}: {total} steps" if total else name)

    def advance(self, detail: str = "") -> None:
        """Count a step; about ten lines a stage tell of those that have a detail."""
        if self._stage is None:
            return
        self._stage.done += 1
        tenth = max(1, self._stage.total // 10)
        if detail and (self._stage.done % tenth == 0 or self._stage.done == self._stage.total):
            self._print(f"{self._stage.name} {self._stage.count}: {detail}")

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        """Count what is sent."""
        self._tally.ask(plan, sites)

    def reply(self, plan: Plan, reply: Reply) -> None:
        """Count what is received, and tell of a site that is absent."""
        self._tally.reply(plan, reply)
        if isinstance(reply, Absence):
            self._print(f"round {plan.round}: {reply.site} is {reply.kind}: {reply.reason}")

    def round(self, record: RoundRecord) -> None:
        """Tell of a round."""
        self._tally.round(record)
        total = f"/{self._stage.total}" if self._stage else ""
        parts = [
            f"round {record.round}{total}",
            *self._tally.numbers(record.metrics),
            f"{len(record.accepted)} of {len(record.asked)} sites",
            self._tally.traffic,
            duration(record.seconds),
        ]
        self._print(", ".join(parts))

    def doing(self, site: str, text: str) -> None:
        """What a site is at this moment is no line."""

    def say(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Screen:
    """A live screen: the stage's bar, the numbers so far, and a table of the sites of the round."""

    def __init__(self, console: Console, job: Job | None) -> None:
        self._console = console
        self._tally = _Tally(job)
        self._stage: _Stage | None = None
        self._rows: dict[str, _Row] = {}
        self._spinner = Spinner("dots", style="cyan")
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage; the one before leaves a line."""
        self.end_stage()
        self._stage = _Stage(name, total, done, done)

    def advance(self, detail: str = "") -> None:
        """Count a step."""
        if self._stage is not None:
            self._stage.done += 1
            self._stage.detail = detail

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        """Show who is asked."""
        self._tally.ask(plan, sites)
        for site in sites:
            row = self._rows.setdefault(site, _Row())
            if plan.task == "evaluate" and row.style == ABSENT:
                continue
            row.doing, row.style = ("to train", "dim") if plan.task == "train" else ("to evaluate", "dim")

    def reply(self, plan: Plan, reply: Reply) -> None:
        """Show who has answered."""
        self._tally.reply(plan, reply)
        if isinstance(reply, Absence):
            self._rows.setdefault(reply.site, _Row()).doing = f"{reply.kind}: {reply.reason}"
            self._rows[reply.site].style = ABSENT
            self._console.print(
                Text(f"  ! round {plan.round}: {reply.site} is {reply.kind}: {reply.reason}", ABSENT), soft_wrap=True
            )
            return
        row = self._rows.setdefault(reply.header.site, _Row())
        if row.style != ABSENT:
            row.doing, row.style = ("trained", "green") if plan.task == "train" else ("evaluated", "green")
        if plan.task == "train":
            row.seconds = reply.header.seconds

    def round(self, record: RoundRecord) -> None:
        """Show the round's numbers."""
        self._tally.round(record)
        for site, metrics in record.site_metrics.items():
            row = self._rows.setdefault(site, _Row())
            row.loss = metrics.get(TRAINING + "loss", row.loss)
            if self._tally.metric:
                row.metric = metrics.get(self._tally.metric, row.metric)

    def doing(self, site: str, text: str) -> None:
        """Show it in the site's row."""
        row = self._rows.setdefault(site, _Row())
        row.doing, row.style = text, ""

    def say(self, text: str) -> None:
        """Print it above the live part."""
        self._console.print(Text(text), soft_wrap=True)

    def end_stage(self, *, failed: bool = False) -> None:
        """Leave a line that says what the stage did, or how far it came."""
        stage, self._stage = self._stage, None
        if stage is None:
            return
        line = Text.assemble(("✗ ", "red") if failed else ("✓ ", "green"), stage.name)
        facts = [stage.count, duration(stage.seconds)]
        if self._rows:
            facts += [*self._tally.numbers(self._tally.metrics), self._tally.traffic]
            self._rows = {}
        line.append("  " + " · ".join(fact for fact in facts if fact), "dim")
        self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        stage = self._stage
        if stage is None:
            return Text()
        head = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [self._spinner, Text(stage.name, "bold")]
        if stage.total:
            left = stage.seconds_left
            cells += [
                ProgressBar(stage.total, stage.done, width=28),
                Text(stage.count),
                Text(f"about {duration(round(left))} left" if left is not None else duration(stage.seconds), "dim"),
            ]
        else:
            cells.append(Text(duration(stage.seconds), "dim"))
        head.add_row(*cells)
        parts: list[RenderableType] = [head]
        if stage.detail:
            parts.append(Text(f"  {stage.detail}", "dim", no_wrap=True, overflow="ellipsis"))
        if self._rows:
            numbers = [*self._tally.numbers(self._tally.metrics)]
            if self._tally.best is not None:
                numbers.append(f"best {number(self._tally.best)}")
            parts += [Text("  " + " · ".join([*numbers, self._tally.traffic])), self._table()]
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim", pad_edge=True)
        table.add_column("site", no_wrap=True, max_width=28)
        table.add_column("", no_wrap=True, max_width=40)
        for title in ("training loss", self._tally.metric or "held-out", "seconds"):
            table.add_column(title, justify="right", no_wrap=True)
        absent = [site for site, row in self._rows.items() if row.style == ABSENT]
        others = [site for site in sorted(self._rows) if site not in absent]
        names = [*absent, *others]
        for site in sorted(names[:MOST_ROWS]):
            row = self._rows[site]
            values = (number(row.loss), number(row.metric), f"{row.seconds:.1f}" if row.seconds is not None else "")
            table.add_row(Text(site), Text(row.doing, row.style), *values)
        if len(names) > MOST_ROWS:
            table.add_row(Text(f"and {len(names) - MOST_ROWS} more", "dim"))
        return table
