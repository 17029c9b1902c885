# SPDX-License-Identifier: Apache-2.0
"""The report's plots: SVG for a page that sets their colours, so that they fit light and dark.

Text and axes are drawn in ``currentColor`` and series in the page's CSS variables; matplotlib, which knows neither,
draws them in stand-in colours that are replaced afterwards. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK = "#010203"
SERIES = {f"#0102{10 + i:02x}": f"var(--s{i})" for i in range(10)}
HUES = list(SERIES)
HEAT = "#3987e5"

MOST_LINES = 10
"""Above so many sites, lines are told apart no more: all are thin, and their mean is drawn."""
MOST_MARKS = 12
MOST_CELLS = 24
MOST_LETTERS = 18
MOST_SITES = 60

_STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names are names, with or without a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "hansa",
}

Draw = Callable[[Any], None]
"""Draws into matplotlib axes."""


def svg(name: str, title: str, draw: Draw, height: float = 2.9) -> str:
    """Return a figure as an inline SVG element that scales with its container.

    Args:
        name: a prefix for its ids, unique in the page.
        title: what it shows, for those who can't see it.
        draw: draws into the axes.
        height: inches; the width is 5.6.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        draw(figure.subplots())
        raw = io.StringIO()
        figure.savefig(
            raw,
            format="svg",
            transparent=True,
            metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
        )
    return _inline(raw.getvalue(), name, title)


def _inline(text: str, name: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", text)
    text = text.replace(INK, "currentColor")
    for stand_in, variable in SERIES.items():
        text = text.replace(stand_in, variable)
    return text


def metric_over_rounds(
    metric: str, rounds: Sequence[tuple[int, float]], levels: Mapping[str, float], chosen: int | None
) -> Draw:
    """Draw a metric of the shared model after each round; ``levels`` are other models' values, by title."""

    def draw(axes: Any) -> None:
        numbers = [number for number, _ in rounds]
        values = [value for _, value in rounds]
        marker = "o" if len(rounds) <= 2 * MOST_MARKS else None
        axes.plot(numbers, values, color=HUES[0], marker=marker, label="Federated", zorder=3)
        for number, value in rounds:
            if number == chosen:
                axes.plot([number], [value], color=HUES[0], marker="o", markersize=8, fillstyle="none", zorder=4)
        for place, (title, level) in enumerate(levels.items(), start=1):
            axes.axhline(level, color=HUES[place], linestyle=("--", "-.", ":")[place % 3], linewidth=1.4, label=title)
        axes.set_xlabel("round")
        axes.set_ylabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    return draw


def lines_a_site(values: Mapping[str, Sequence[tuple[int, float]]], label: str) -> Draw:
    """Draw one line a site over rounds, and their mean where there are many."""

    def draw(axes: Any) -> None:
        many = len(values) > MOST_LINES
        few_rounds = max(map(len, values.values())) <= MOST_MARKS
        for place, (site, points) in enumerate(values.items()):
            axes.plot(
                [number for number, _ in points],
                [value for _, value in points],
                color=INK if many else HUES[place % len(HUES)],
                alpha=0.25 if many else 1,
                linewidth=0.8 if many else 1.3,
                marker="o" if few_rounds and not many else None,
                label=None if many else site,
            )
        if many:
            mean = _mean(values)
            axes.plot(list(mean), list(mean.values()), color=HUES[0], label=f"mean of {len(values)} sites")
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)

    return draw


def _mean(values: Mapping[str, Sequence[tuple[int, float]]]) -> dict[int, float]:
    gathered: dict[int, list[float]] = {}
    for points in values.values():
        for number, value in points:
            gathered.setdefault(number, []).append(value)
    return {number: sum(each) / len(each) for number, each in sorted(gathered.items())}


def traffic(rounds: Sequence[int], down: Sequence[int], up: Sequence[int], name: Callable[[float], str]) -> Draw:
    """Draw the bytes of each round: to the sites, and from them on top."""

    def draw(axes: Any) -> None:
        axes.bar(rounds, down, color=HUES[0], width=0.72, label="to the sites")
        axes.bar(rounds, up, bottom=down, color=HUES[1], width=0.72, label="from the sites")
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
        axes.set_ylim(0, max((d + u for d, u in zip(down, up, strict=True)), default=1) * 1.22 or 1)
        axes.legend(loc="upper left", ncols=2)

    return draw


def counts(sites: Sequence[str], kinds: Mapping[str, Sequence[int]]) -> Draw:
    """Draw how many rows of each kind a site has, a bar a site."""

    def draw(axes: Any) -> None:
        left = [0] * len(sites)
        for place, (kind, values) in enumerate(kinds.items()):
            axes.barh(sites, values, left=left, color=HUES[place % len(HUES)], height=0.7, label=kind)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("rows")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(0, max(left, default=1) * 1.02 or 1)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(kinds)))

    return draw


def shortened(label: str) -> str:
    """Return a label that leaves room for the cells it belongs to."""
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 1]}…"


def label_shares(sites: Sequence[str], labels: Sequence[str], shares: Sequence[Sequence[float]]) -> Draw:
    """Draw a heat map of each site's shares of the labels; ``shares[site][label]`` are in [0, 1]."""
    red, green, blue = to_rgb(HEAT)
    ramp = LinearSegmentedColormap.from_list("heat", [(red, green, blue, 0.04), (red, green, blue, 0.85)])

    def draw(axes: Any) -> None:
        axes.pcolormesh(shares, cmap=ramp, vmin=0, vmax=max(max(row, default=0) for row in shares) or 1)
        axes.set_xticks([i + 0.5 for i in range(len(labels))], [shortened(label) for label in labels])
        axes.set_yticks([i + 0.5 for i in range(len(sites))], sites)
        if len(labels) > 6 or max(map(len, labels)) > 7:
            axes.tick_params(axis="x", rotation=45 if len(labels) <= 12 else 90)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(labels) <= 12 and len(sites) <= MOST_CELLS:
            for row, values in enumerate(shares):
                for column, value in enumerate(values):
                    if value:
                        axes.text(column + 0.5, row + 0.5, f"{value:.0%}", ha="center", va="center", fontsize=7.5)

    return draw
