# SPDX-License-Identifier: Apache-2.0
"""A training program whose every number can be worked out by hand: quadratics f_i(w) = a_i/2 |w - b_i|^2.

A job names it as recipe ``toys:build``; options make sites slow, fail, or send rubbish.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from hansa.core.config import Job, parse
from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE, Correction, SiteReport, Work
from hansa.core.storage import save_tree
from hansa.core.strategy import Steps
from hansa.core.values import Plan
from hansa.errors import DataError

SITES = ("s0", "s1", "s2")
CURVATURES = {"s0": 1.0, "s1": 2.0, "s2": 4.0}
TARGETS = {"s0": 1.0, "s1": 2.0, "s2": 3.0}
EXAMPLES = {"s0": 3, "s1": 2, "s2": 5}
LR = 0.05
STEPS = 5


class Quadratics:
    """``size`` copies of the same quadratic at each of three sites.

    Args:
        size: elements of the one tensor ``w``.
        delay_s: how long a step takes, by site or for all.
        faults: (site, round) -> what goes wrong: raise, data, nan, exit, partial.
        varied: whether the elements begin apart, so that no two stretches of them have the same bytes.
        trained: a file that gets a line, site and round, for each time that a site has trained.
    """

    def __init__(self, size=4, delay_s=0.0, faults=None, sites=SITES, trained=None, varied=False):
        self.sites = tuple(sites)
        self.traits = frozenset({Trait.STEPWISE})
        self._start = np.arange(size, dtype=np.float64) / size if varied else np.zeros(size, np.float64)
        self._delay_s = delay_s if isinstance(delay_s, dict) else dict.fromkeys(sites, delay_s)
        self._faults = faults or {}
        self._trained = trained

    def initial(self):
        return {"w": self._start, "count": np.zeros(1, np.int64)}

    def inspect(self, site):
        if self._faults.get((site, 0)) == "data":
            raise DataError("The site has no examples.", site=site)
        return SiteReport(site, {"train": EXAMPLES[site], "test": EXAMPLES[site]}, {"even": 1, "odd": 2})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        fault = self._faults.get((site, plan.round))
        if fault == "raise":
            raise RuntimeError("the disk of this site is on fire")
        if fault == "data":
            raise DataError("The site has lost its data.", site=site)
        if fault == "exit":
            raise SystemExit(3)
        a, b, n = self._problem(site)
        params = {"w": plan.params["w"]}
        steps = 2 if fault == "partial" else STEPS
        for _ in range(steps):
            time.sleep(self._delay_s.get(site, 0.0))
            grads = {"w": a * (params["w"] - b)}
            if correction:
                grads = correction.adjust(correction.context, params, grads)
            params = {"w": params["w"] - LR * grads["w"]}
        if self._trained is not None:
            with Path(self._trained).open("a") as file:
                file.write(f"{site} {plan.round}\n")
        if fault == "nan":
            params = {"w": params["w"] * np.nan}
        loss = n * float(a / 2 * (params["w"][0] - b) ** 2) if fault != "nan" else 0.0
        return Work(
            {**plan.params, **params},
            n,
            Steps(steps, steps * LR),
            {"loss_sum": loss, "examples": n},
            steps / STEPS,
        )

    def evaluate(self, site, plan):
        a, b, n = self._problem(site)
        return {"loss_sum": n * float(a / 2 * (plan.params["w"][0] - b) ** 2), "examples": n}

    def summarise(self, sums):
        return {"loss": sums["loss_sum"] / sums["examples"]}

    def export(self, params, directory: Path):
        (directory / "model").mkdir()
        save_tree(directory / "model" / "model.safetensors", params)

    def show(self, params):
        return {}

    def close(self):
        pass

    def _problem(self, site):
        if site != EVERYONE:
            return CURVATURES[site], TARGETS[site], EXAMPLES[site]
        n = np.array([EXAMPLES[s] for s in self.sites], float)
        a = np.array([CURVATURES[s] for s in self.sites])
        b = np.array([TARGETS[s] for s in self.sites])
        return float((n * a).sum() / n.sum()), float((n * a * b).sum() / (n * a).sum()), float(n.sum())


class Many(Quadratics):
    """The same over ten sites or as many as are asked for, each with a problem of its own."""

    def __init__(self, num_sites=10, **options):
        super().__init__(sites=[f"s{number:02d}" for number in range(num_sites)], **options)

    def inspect(self, site):
        return SiteReport(site, {"train": self._problem(site)[2]})

    def _problem(self, site):
        number = self.sites.index(site)
        return 1.0 + number / 10, float(number % 4), 10 + number


def many(job: Job) -> Many:
    """Return a program of many sites; faults are written as in :func:`build`."""
    return build(job, Many)


def build(job: Job, kind=Quadratics) -> Quadratics:
    """Return the program that a job's options ask for; faults are written as ``{"s1:3": "raise"}``."""
    options = dict(job.recipe.options)
    faults = {}
    for key, fault in options.pop("faults", {}).items():
        site, _, number = key.partition(":")
        faults[site, int(number)] = fault
    return kind(faults=faults, **options)


def job(**values) -> Job:
    """Return a job over the quadratics; keyword arguments replace its sections."""
    recipe = {"name": "toys:build", **values.pop("recipe", {})}
    defaults = {
        "name": "toy",
        "rounds": 4,
        "train": {"optimizer": "sgd"},
        "baselines": {"base": False, "local": False},
    }
    return parse({**defaults, "recipe": recipe, **values})


def fixed_point_fedavg():
    """Return where FedAvg ends: each site maps w to b + (1 - la)^K (w - b), weighed by examples."""
    n, a, b = (np.array([table[s] for s in SITES], float) for table in (EXAMPLES, CURVATURES, TARGETS))
    pull = n * (1 - (1 - LR * a) ** STEPS)
    return float((pull * b).sum() / pull.sum())
