# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that fits.

    >>> size(0), size(1_500), size(2_345_678), size(7e9)
    ('0 B', '1.5 kB', '2.3 MB', '7.0 GB')
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Return a time span.

    >>> duration(0.042), duration(7.25), duration(20), duration(75), duration(3700)
    ('0.04 s', '7.2 s', '20 s', '1 min 15 s', '1 h 01 min')
    """
    if isinstance(seconds, int) and seconds < 60:
        return f"{seconds} s"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Return a metric with four digits that say something, and nothing for None.

    >>> number(8.83123), number(0.000123456), number(1234.5), number(None)
    ('8.831', '0.0001235', '1234', '')
    >>> number(8.8), number(0.0964), number(0.0)
    ('8.800', '0.0964', '0')
    """
    if value is None:
        return ""
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:#.4g}"
