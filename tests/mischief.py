# SPDX-License-Identifier: Apache-2.0
"""A program whose sites sleep, die, and keep a diary: recipe ``mischief:build``.

Options: ``sites``, ``diary`` (a file that gets one line a training: pid, site, round, begin, end, CUDA), ``sleep``
(site or ``site:round`` -> seconds) and ``deeds`` (``site:round`` -> kill, exit, segfault, raise).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

import numpy as np

from hansa.core.config import Job, parse
from hansa.core.fit import Trait
from hansa.core.ports import SiteReport, Work
from hansa.core.strategy import Steps
from hansa.errors import DataError


class Mischief:
    def __init__(self, sites=("a", "b", "c"), diary=None, sleep=None, deeds=None, sticky=False, size=8):
        self.sites = tuple(sites)
        self.traits = frozenset({Trait.OPAQUE_STEPS} if sticky else ())
        self._diary = diary
        self._sleep = sleep or {}
        self._deeds = deeds or {}
        self._size = size

    def initial(self):
        return {"w": np.zeros(self._size, np.float32)}

    def inspect(self, site):
        if self._deeds.get(site) == "empty":
            raise DataError("The site has no examples.", site=site)
        return SiteReport(site, {"train": 1})

    def train(self, site, plan, correction):
        begun = time.time()
        time.sleep(self._sleep.get(f"{site}:{plan.round}", self._sleep.get(site, 0.0)))
        match self._deeds.get(f"{site}:{plan.round}"):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case "segfault":
                faulthandler._sigsegv()
            case "raise":
                raise ValueError("the site's disk is on fire")
        if self._diary:
            with Path(self._diary).open("a") as file:
                seen = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
                file.write(f"{os.getpid()} {site} {plan.round} {begun} {time.time()} [{seen}]\n")
        number = 1 + self.sites.index(site)
        params = {"w": plan.params["w"] + np.float32(0.1 * number) * (number - plan.params["w"])}
        return Work(params, number, Steps(1, 0.1), {"loss_sum": float(params["w"][0]), "examples": number})

    def evaluate(self, site, plan):
        return {"loss_sum": float(plan.params["w"][0]), "examples": 1}

    def summarise(self, sums):
        return {"loss": sums["loss_sum"] / sums["examples"] if sums["examples"] else float("nan")}

    def export(self, params, directory):
        (directory / "exported").write_bytes(params["w"].tobytes())

    def show(self, params):
        return {"w": str(params["w"][0])}

    def close(self):
        if self._diary:
            Path(f"{self._diary}.closed").touch()


def build(job: Job) -> Mischief:
    """Return the program that the job's options ask for, or fail to."""
    options = dict(job.recipe.options)
    match options.pop("start", None):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "data":
            raise DataError("There is no file 'x.jsonl'.")
        case "defect":
            raise ZeroDivisionError("a defect")
        case "once":
            with Path(options["diary"] + ".starts").open("a") as file:
                file.write("x")
            if Path(options["diary"] + ".starts").stat().st_size > options.pop("starts"):
                os._exit(9)
    options.pop("starts", None)
    return Mischief(**options)


def job(rounds=3, engine="processes", **values) -> Job:
    """Return a job over this program; keyword arguments replace its sections."""
    recipe = {"name": "mischief:build", **values.pop("recipe", {})}
    sections = {"name": "mischief", "rounds": rounds, "train": {"optimizer": "sgd"}, "evaluation": {"every": 0}}
    engine_section = {"name": engine, **values.pop("engine_options", {})}
    return parse({**sections, "recipe": recipe, "engine": engine_section, **values})


def diary(path: Path) -> list[tuple[int, str, int, float, float, str]]:
    """Return the lines of a diary."""
    found = []
    for line in path.read_text().splitlines():
        pid, site, number, begin, end, seen = line.split()
        found.append((int(pid), site, int(number), float(begin), float(end), seen[1:-1]))
    return found
