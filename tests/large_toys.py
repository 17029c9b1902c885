# SPDX-License-Identifier: Apache-2.0
"""The quadratics of ``toys`` in a worker for which every model is large: recipe ``large_toys:build``."""

from __future__ import annotations

from hansa.core import tree as trees
from toys import Quadratics
from toys import build as toys_build


def build(job) -> Quadratics:
    """Return the program that the job's options ask for."""
    trees.LARGE = 0
    return toys_build(job)
