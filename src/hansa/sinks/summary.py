# SPDX-License-Identifier: Apache-2.0
"""The comparison that a report opens with: base, local-only, federated and central, on own and on everyone's data.

How each number is made, for one metric, S being the sites that every compared model was judged at:

| row | own held-out data: mean over S of | everyone's held-out data |
|---|---|---|
| base, federated, central | the model's value on the site's data | one value over all sites' data pooled |
| local-only | the value of the site's own model on its data | mean over the sites' models of the pooled value |

Own values are means of sites, so every site counts once; pooled values count every example (or token) once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hansa.core.values import TRAINING

PREFERRED = ("perplexity", "f1", "accuracy", "loss")
LOWER_IS_BETTER = ("loss", "perplexity", "error", "rmse", "mae")

TITLES = {
    "base": "Base model",
    "local": "Local only",
    "federated": "Federated",
    "central": "Central",
}
_LOCAL = "local."


@dataclass(frozen=True)
class Row:
    """One model, or one kind of model.

    Attributes:
        name: base, local, federated or central.
        own: the mean over sites of the value on each site's own held-out data.
        everyone: the value on all sites' held-out data together.
        sites: site -> the value on that site's own held-out data.
    """

    name: str
    own: float | None
    everyone: float | None
    sites: Mapping[str, float]

    @property
    def title(self) -> str:
        """The row's name for people."""
        return TITLES[self.name]


@dataclass(frozen=True)
class Summary:
    """The comparison for one metric.

    Attributes:
        metric: its name.
        mode: ``min`` where lower is better, else ``max``.
        rows: base, local, federated, central; those that the run has.
        sites: the sites that every row was judged at, over which ``own`` is the mean.
        left_out: sites that some row was not judged at.
    """

    metric: str
    mode: str
    rows: tuple[Row, ...]
    sites: tuple[str, ...]
    left_out: tuple[str, ...]

    def row(self, name: str) -> Row | None:
        """Return the row called ``name``, if the run has it."""
        return next((row for row in self.rows if row.name == name), None)

    def best(self, column: str) -> str | None:
        """Return the name of the row that is best in ``own`` or ``everyone``; central, the ceiling, left out."""
        return self._best({row.name: getattr(row, column) for row in self.rows})

    def best_at(self, site: str) -> str | None:
        """Return the name of the row that is best on the site's own data; central left out."""
        return self._best({row.name: row.sites.get(site) for row in self.rows})

    @property
    def judged_at(self) -> list[str]:
        """Every site that any model was judged at, sorted."""
        return sorted({*self.sites, *self.left_out})

    def _best(self, values: Mapping[str, float | None]) -> str | None:
        known = {name: value for name, value in values.items() if value is not None and name != "central"}
        if len(known) < 2:
            return None
        return (min if self.mode == "min" else max)(known, key=lambda name: known[name])


def mode_of(job: Mapping[str, Any], metric: str) -> str:
    """Say whether ``min`` or ``max`` of a metric is better: as the job has it, or by the metric's name."""
    if job["evaluation"]["metric"] == metric:
        return str(job["evaluation"]["mode"])
    return "min" if metric in LOWER_IS_BETTER else "max"


def main_metric(job: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the metric that matters most among ``names``.

    It is the job's ``evaluation.metric``, unless that is the default ``loss`` and there is one that says more to
    people: perplexity, F1, accuracy.
    """
    known = [name for name in names if not name.startswith(TRAINING)]
    chosen = job["evaluation"]["metric"]
    if chosen != "loss" and chosen in known:
        return str(chosen)
    return next((name for name in PREFERRED if name in known), known[0] if known else None)


def summary(report: Mapping[str, Any], metric: str | None = None) -> Summary | None:
    """Compute the comparison of a report, for its main metric by default; None where nothing was judged.

    Args:
        report: as ``report.json`` holds it.
        metric: a metric's name.
    """
    models = _models(report)
    names = metrics_of(report)
    metric = metric or main_metric(report["job"], names)
    if metric is None:
        return None
    own = {name: _own(scores, metric) for name, scores in models.items()}
    own = {name: values for name, values in own.items() if values}
    everyone = {name: _everyone(scores, metric) for name, scores in models.items()}
    judged = [set(values) for values in own.values()]
    sites = tuple(sorted(set.intersection(*judged))) if judged else ()
    left_out = tuple(sorted(set.union(*judged) - set(sites))) if judged else ()
    rows = tuple(
        Row(
            name,
            fmean(own[name][site] for site in sites) if name in own and sites else None,
            everyone[name],
            own.get(name, {}),
        )
        for name in TITLES
        if name in models and (name in own or everyone[name] is not None)
    )
    return Summary(metric, mode_of(report["job"], metric), rows, sites, left_out) if rows else None


def metrics_of(report: Mapping[str, Any]) -> list[str]:
    """Return the names of all held-out metrics in a report, the main one first."""
    found = [name for scores in _models(report).values() for _, overall, _ in scores for name in overall]
    names = list(dict.fromkeys(found))
    main = main_metric(report["job"], names)
    return sorted(names, key=lambda name: name != main)


def federated_round(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the record of the round whose model was saved, or else of the last round that was judged, if any."""
    rounds: Sequence[Mapping[str, Any]] = report["rounds"]
    if report.get("model"):
        return next((record for record in rounds if record["round"] == report["model"]["round"]), None)
    return next((record for record in reversed(rounds) if _judged(record["metrics"])), None)


_Scores = tuple[str | None, Mapping[str, float], Mapping[str, Mapping[str, float]]]
"""The site that trained a model (None for a shared one), its pooled metrics, its metrics site by site."""


def _models(report: Mapping[str, Any]) -> dict[str, list[_Scores]]:
    models: dict[str, list[_Scores]] = {}
    for name, scores in report["baselines"].items():
        if name.startswith(_LOCAL):
            models.setdefault("local", []).append((name[len(_LOCAL) :], scores["overall"], scores["by_site"]))
        elif name in TITLES:
            models[name] = [(None, scores["overall"], scores["by_site"])]
    record = federated_round(report)
    if record is not None:
        by_site = {site: _judged(values) for site, values in record["site_metrics"].items()}
        models["federated"] = [(None, _judged(record["metrics"]), {s: v for s, v in by_site.items() if v})]
    return models


def _judged(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(TRAINING)}


def _own(models: Sequence[_Scores], metric: str) -> dict[str, float]:
    return {
        site: values[metric]
        for trained_by, _, by_site in models
        for site, values in by_site.items()
        if trained_by in (None, site) and values.get(metric) is not None
    }


def _everyone(models: Sequence[_Scores], metric: str) -> float | None:
    values = [overall[metric] for _, overall, _ in models if overall.get(metric) is not None]
    return fmean(values) if values else None
