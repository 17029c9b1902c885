# SPDX-License-Identifier: Apache-2.0
"""Writers with the methods of TensorBoard's, MLflow's and Weights & Biases' own, over :func:`hansa.client.log`.

A script that imports one of them from ``nvflare.client.tracking`` imports it from here instead. What they are given
goes to the site's log; numbers also travel with the update of the round, into the run's ``metrics.jsonl`` and
TensorBoard.

| what is logged | name -> number |
|---|---|
| SCALAR, METRIC | key -> value |
| SCALARS | ``key/name`` -> value |
| METRICS | name -> value |
| a parameter, text, tag | none |
| NaN, infinity, an integer beyond float64 | key -> None |
| more numbers of one name than an update carries | every second is dropped, as often as need be |
| more names | those that came later are dropped |
| ``global_step`` | is the number's step; None if it is no integer |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hansa.client.script import AnalyticsDataType, log
from hansa.core.values import MAX_NAME, MAX_NAMES, MAX_POINTS

Point = tuple[int | None, float | None]


class Log:
    """The numbers that a script logs in one task, as many as its update may carry."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[Point]] = {}
        self._seen: dict[str, int] = {}
        self._strides: dict[str, int] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take what :func:`hansa.client.log` sent; whatever is no number is left out."""
        kind, key, value, beside = (entry.get(name) for name in ("data_type", "key", "value", "with"))
        step = beside.get("global_step") if isinstance(beside, Mapping) else None
        step = step if isinstance(step, int) and abs(step) < 1 << 63 else None
        if kind in (AnalyticsDataType.SCALAR, AnalyticsDataType.METRIC):
            self._put(str(key), step, value)
        elif kind in (AnalyticsDataType.SCALARS, AnalyticsDataType.METRICS) and isinstance(value, Mapping):
            prefix = f"{key}/" if kind == AnalyticsDataType.SCALARS else ""
            for name, part in value.items():
                self._put(f"{prefix}{name}", step, part)

    def _put(self, name: str, step: int | None, value: Any) -> None:
        name = name[:MAX_NAME]
        new = name not in self.numbers
        if not name or not isinstance(value, int | float) or (new and len(self.numbers) == MAX_NAMES):
            return
        points, stride, seen = self.numbers.setdefault(name, []), self._strides.get(name, 1), self._seen.get(name, 0)
        if seen % stride == 0:
            if len(points) == MAX_POINTS:
                del points[1::2]
                self._strides[name] = stride * 2
            points.append((step, _finite(value)))
        self._seen[name] = seen + 1


def _finite(value: float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


class SummaryWriter:
    """TensorBoard's way to log."""

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a number."""
        log(tag, scalar, AnalyticsDataType.SCALAR, global_step=global_step, **kwargs)

    def add_scalars(
        self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **kwargs: Any
    ) -> None:
        """Log several numbers under one tag."""
        log(tag, scalars, AnalyticsDataType.SCALARS, global_step=global_step, **kwargs)


class WandBWriter:
    """Weights & Biases' way to log."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log several numbers."""
        log("metrics", metrics, AnalyticsDataType.METRICS, global_step=step)


class MLflowWriter:
    """MLflow's way to log."""

    def log_param(self, key: str, value: Any) -> None:
        """Log a setting."""
        log(key, value, AnalyticsDataType.PARAMETER)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log several settings."""
        log("params", values, AnalyticsDataType.PARAMETERS)

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Log a number."""
        log(key, value, AnalyticsDataType.METRIC, global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log several numbers."""
        log("metrics", metrics, AnalyticsDataType.METRICS, global_step=step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Log a text, under the name of a file."""
        log("text", text, AnalyticsDataType.TEXT, path=artifact_file_path)

    def set_tag(self, key: str, tag: Any) -> None:
        """Log a tag."""
        log(key, tag, AnalyticsDataType.TAG)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Log several tags."""
        log("tags", tags, AnalyticsDataType.TAGS)
