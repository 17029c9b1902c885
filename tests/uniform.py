# SPDX-License-Identifier: Apache-2.0
"""Whether numbers look uniform, by tests that fresh noise fails once in 10^9 times.

Chi-square over the 256 values of each byte (its normal approximation), and Kolmogorov and Smirnov's distance of whole
elements from the uniform distribution.
"""

from __future__ import annotations

import math

import numpy as np

from hansa.core.lazy import Array


def looks_uniform(values: Array, bits: int | None = None) -> bool:
    """Say whether integers pass as uniform modulo 2^bits (those of their dtype by default)."""
    bits = bits or 8 * values.itemsize
    kind = np.dtype(f"uint{8 * values.itemsize}")
    unsigned = values.view(kind) & kind.type((1 << bits) - 1)
    for place in unsigned.view(np.uint8).reshape(-1, values.itemsize).T[: bits // 8]:
        expected = place.size / 256
        chi = ((np.bincount(place, minlength=256) - expected) ** 2 / expected).sum()
        if abs(chi - 255) > 7 * math.sqrt(2 * 255):
            return False
    ordered = np.sort(unsigned.astype(np.float64)) / 2.0**bits
    steps = np.arange(1, ordered.size + 1) / ordered.size
    distance = max(np.max(steps - ordered), np.max(ordered - steps + 1 / ordered.size))
    return bool(distance * math.sqrt(ordered.size) < 3.3)  # Kolmogorov: P[> 3.3] is 7e-10
