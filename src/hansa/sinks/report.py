# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one page with everything in it, which opens without a network, in light and dark.

It is made from ``report.json`` alone, so it can be made again at any time, by any later release.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from hansa.core import storage
from hansa.core.values import TRAINING
from hansa.errors import MissingExtraError, VersionError
from hansa.sinks.summary import Row, Summary, federated_round, metrics_of, summary
from hansa.sinks.text import duration, number, size

FORMAT = 1


def write(directory: Path, report: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` of the run in ``directory`` and return its path.

    Args:
        directory: a run's folder.
        report: what is known of the run; its ``report.json`` by default.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed; the message says how to get them.
        StorageError: ``report.json`` can't be read or the page can't be written.
        VersionError: another release wrote ``report.json`` in a format that this one does not read.
    """
    report = report if report is not None else storage.read_json(directory / "report.json")
    path = directory / "report.html"
    storage.write_atomic(path, page(report).encode())
    return path


def page(report: Mapping[str, Any]) -> str:
    """Return the page for a report.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        VersionError: the report has a format that this release does not read.
    """
    if report.get("format") != FORMAT:
        raise VersionError(f"The report has format {report.get('format')}; this release reads {FORMAT}.")
    plots = figures(f"then `hansa report {report['run']}` writes the page.")
    return rendered("sinks/report.html.j2", **_content(report), figures=_figures(report, plots))


def figures(then: str) -> ModuleType:
    """Return :mod:`hansa.sinks.plots`.

    Args:
        then: what to do once the missing library is installed.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401  (a page needs both)

        from hansa.sinks import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        raise MissingExtraError(
            f"A page needs {error.name!r}, which is not installed. Install it with: pip install 'hansa[report]', {then}"
        ) from None
    return plots


def rendered(template: str, **content: Any) -> str:
    """Return a page from a template, named by its path in the package."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("hansa").joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "size": size, "duration": duration}
    return environment.get_template(template).render(**content)


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    main = summary(report)
    rounds = report["rounds"]
    record = federated_round(report)
    tables = [found for name in metrics_of(report) if (found := summary(report, name)) is not None]
    return {
        "report": report,
        "job": report["job"],
        "main": main,
        "others": tables[1:],
        "verdict": verdict(main) if main else [],
        "selection": selection(report),
        "record": record,
        "down": sum(r["bytes_down"] for r in rounds),
        "up": sum(r["bytes_up"] for r in rounds),
        "round_seconds": sum(r["seconds"] for r in rounds),
        "absent": [(r["round"], entry) for r in rounds for entry in r["absent"]],
        "sites": [entry["site"] for entry in report["sites"]],
        "training": TRAINING,
        "privacy": report.get("privacy"),
        "masks": report.get("secure_aggregation"),
        "secret": _is_secret(report),
        "strategy": _choice(report["job"]["strategy"]),
        "recipe": report["job"]["recipe"]["name"],
        "resolved": json.dumps(report["job"], indent=2, ensure_ascii=False),
    }


def _is_secret(report: Mapping[str, Any]) -> bool:
    """Say whether a promise rests on nobody's knowing who took part in a round."""
    return bool(report.get("privacy") and report["privacy"]["secret_cohorts"])


def _choice(value: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} = {option}" for key, option in value.items() if key != "name" and option is not None)
    return f"{value['name']} ({options})" if options else str(value["name"])


def verdict(found: Summary) -> list[str]:
    """Say in words how the federated model compares, on each column, whichever way it went.

    >>> rows = (Row("base", 9.0, 9.3, {}), Row("local", 8.0, 9.4, {}), Row("federated", 8.5, 8.8, {}))
    >>> verdict(Summary("perplexity", "min", rows, ("a", "b"), ()))[0]
    "On everyone's held-out data the federated model (8.800) is better than base (9.300) and local only (9.400)."
    """
    federated = found.row("federated")
    if federated is None:
        return []
    lines = []
    for column, where in (("everyone", "everyone's"), ("own", "the sites' own")):
        value = getattr(federated, column)
        others = [(row, getattr(row, column)) for row in found.rows if row.name in ("base", "local")]
        known = [(row, other) for row, other in others if other is not None]
        if value is None or not known:
            continue
        said = [f"{_against(value, other, found.mode)} {_called(row)} ({number(other)})" for row, other in known]
        if len(said) == 2 and said[0].partition(" than ")[0] == said[1].partition(" than ")[0]:
            said[1] = said[1].partition(" than ")[2] or said[1]
        lines.append(f"On {where} held-out data the federated model ({number(value)}) is {' and '.join(said)}.")
    return lines


def _against(value: float, other: float, mode: str) -> str:
    if value == other:
        return "equal to"
    return "better than" if (value < other) == (mode == "min") else "worse than"


def _called(row: Row) -> str:
    return {"base": "base", "local": "local only"}[row.name]


def selection(report: Mapping[str, Any]) -> list[str]:
    """Say which round's model this is, and whether choosing it makes its figures optimistic."""
    job = report["job"]
    evaluation = job["evaluation"]
    if report["model"] is None:
        return ["The run is not finished: figures are of the last round that was judged."]
    which = f"The model is that of round {report['model']['round']} of {job['rounds']}"
    if job["output"]["model"] == "best":
        return [
            f"{which}, the best by {evaluation['metric']} on the sites' held-out data. It was chosen on the very data "
            "that it is judged on here, so its figures are optimistic; those of the other models were not chosen so."
        ]
    if evaluation["patience"] and report["model"]["round"] < job["rounds"]:
        return [
            f"{which}, the last: training was stopped because {evaluation['metric']} on the sites' held-out data no "
            "longer improved. When to stop was chosen on the data that it is judged on here."
        ]
    return [f"{which}, the last. Nothing was chosen on held-out data."]


def _figures(report: Mapping[str, Any], plots: ModuleType) -> list[dict[str, str]]:
    """Return the plots that the run has data for, each as {title, note, svg}."""
    figures: list[dict[str, str]] = []

    def add(name: str, title: str, note: str, draw: Callable[[Any], None], height: float = 2.9) -> None:
        figures.append({"title": title, "note": note, "svg": plots.svg(name, title, draw, height)})

    main = summary(report)
    rounds = report["rounds"]
    if main and (points := [(r["round"], r["metrics"][main.metric]) for r in rounds if main.metric in r["metrics"]]):
        levels = {row.title: row.everyone for row in main.rows if row.name != "federated" and row.everyone is not None}
        base = main.row("base")
        if base and base.everyone is not None:
            points.insert(0, (0, base.everyone))
        chosen = report["model"]["round"] if report["model"] else None
        better = "lower" if main.mode == "min" else "higher"
        note = f"On everyone's held-out data; {better} is better. The ring marks the model that was saved."
        add("metric", f"{main.metric} over rounds", note, plots.metric_over_rounds(main.metric, points, levels, chosen))
    losses = _over_rounds(rounds, TRAINING + "loss")
    if losses:
        note = "What each site's own training reported, averaged over its steps of the round."
        add("loss", "Training loss at each site", note, plots.lines_a_site(losses, "training loss"))
    figures += _data_figures(report["sites"], plots)
    if rounds and not _is_secret(report):
        numbers = [r["round"] for r in rounds]
        down, up = [r["bytes_down"] for r in rounds], [r["bytes_up"] for r in rounds]
        note = "Tensor bytes to and from all sites of a round."
        add("bytes", "Bytes sent in each round", note, plots.traffic(numbers, down, up, size))
    return figures


def _over_rounds(rounds: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    for record in rounds:
        for site, metrics in sorted(record["site_metrics"].items()):
            if metrics.get(metric) is not None:
                values.setdefault(site, []).append((record["round"], metrics[metric]))
    return dict(sorted(values.items()))


def _data_figures(sites: Sequence[Mapping[str, Any]], plots: ModuleType) -> list[dict[str, str]]:
    figures = []
    seen = sites[: plots.MOST_SITES]
    names = [entry["site"] for entry in seen]
    height = 1.1 + 0.27 * max(len(seen), 4)
    cut = f" The first {len(seen)} of {len(sites)} sites." if len(seen) < len(sites) else ""
    kinds = list(dict.fromkeys(kind for entry in seen for kind in entry["counts"]))
    if kinds:
        title = "Rows at each site"
        draw = plots.counts(names, {kind: [entry["counts"].get(kind, 0) for entry in seen] for kind in kinds})
        note = f"A row is what the data hold one of: a sentence, a picture, a file of text.{cut}"
        figures.append({"title": title, "note": note, "svg": plots.svg("counts", title, draw, height)})
    totals: Counter[str] = Counter()
    for entry in seen:
        totals.update(entry["labels"])
    if totals:
        title = "Labels at each site"
        kept = [label for label, _ in totals.most_common(plots.MOST_CELLS)]
        labels = [label for label in totals if label in kept]
        shares = [
            [entry["labels"].get(label, 0) / (sum(entry["labels"].values()) or 1) for label in labels] for entry in seen
        ]
        fewer = f" The {len(labels)} most frequent of {len(totals)} labels." if len(labels) < len(totals) else ""
        draw = plots.label_shares(names, labels, shares)
        note = f"Each row is a site's training labels in shares of its own.{fewer}{cut}"
        svg = plots.svg(
            "labels", title, draw, height + 0.4 + 0.07 * max(len(plots.shortened(label)) for label in labels)
        )
        figures.append({"title": title, "note": note, "svg": svg})
    return figures
