# SPDX-License-Identifier: Apache-2.0
"""Federated training and fine-tuning of large models, for organisations that may not pool their data.

    job = hansa.load("job.toml")            # or hansa.Job(...)
    run = hansa.run(job)                    # simulate the federation on this machine
    run.model_directory                     # the result, as its library saves it

Public names load when they are first used, so that ``import hansa`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hansa import version

__version__ = version.VERSION

if TYPE_CHECKING:
    from hansa.client.functional import of_numpy, of_torch
    from hansa.core.config import Job, load
    from hansa.core.optimizer import adagrad, adam, sgd, yogi
    from hansa.errors import HansaError
    from hansa.federation import Federation
    from hansa.loop import Process, State, process
    from hansa.runs.run import Run
    from hansa.simulation.run import run
    from hansa.strategies.fedavg import fedavg
    from hansa.strategies.fedavgm import fedavgm
    from hansa.strategies.fedopt import fedadagrad, fedadam, fedyogi
    from hansa.strategies.fedprox import fedprox
    from hansa.strategies.scaffold import scaffold

_HOMES = {
    "Federation": "hansa.federation",
    "HansaError": "hansa.errors",
    "Job": "hansa.core.config",
    "Process": "hansa.loop",
    "Run": "hansa.runs.run",
    "State": "hansa.loop",
    "adagrad": "hansa.core.optimizer",
    "adam": "hansa.core.optimizer",
    "fedadagrad": "hansa.strategies.fedopt",
    "fedadam": "hansa.strategies.fedopt",
    "fedavg": "hansa.strategies.fedavg",
    "fedavgm": "hansa.strategies.fedavgm",
    "fedprox": "hansa.strategies.fedprox",
    "fedyogi": "hansa.strategies.fedopt",
    "load": "hansa.core.config",
    "of_numpy": "hansa.client.functional",
    "of_torch": "hansa.client.functional",
    "process": "hansa.loop",
    "run": "hansa.simulation.run",
    "scaffold": "hansa.strategies.scaffold",
    "sgd": "hansa.core.optimizer",
    "yogi": "hansa.core.optimizer",
}

__all__ = [
    "Federation",
    "HansaError",
    "Job",
    "Process",
    "Run",
    "State",
    "__version__",
    "adagrad",
    "adam",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedprox",
    "fedyogi",
    "load",
    "of_numpy",
    "of_torch",
    "process",
    "run",
    "scaffold",
    "sgd",
    "yogi",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hansa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
