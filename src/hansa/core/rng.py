# SPDX-License-Identifier: Apache-2.0
"""Reproducible generators, derived from (seed, round, site, purpose) and from nothing else.

These are for sampling cohorts, shuffling and initialising; protective noise never comes from here.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *labels: int | str) -> int:
    """Return a 63-bit seed that depends on ``seed`` and every label, and on their order.

    >>> derive(0, 1, "berlin") == derive(0, 1, "berlin") != derive(0, 2, "berlin")
    True
    """
    digest = hashlib.sha256()
    for item in (seed, *labels):
        data = str(item).encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def generator(seed: int, *labels: int | str) -> np.random.Generator:
    """Return a NumPy generator for (seed, labels)."""
    return np.random.default_rng(derive(seed, *labels))
