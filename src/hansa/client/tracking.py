# SPDX-License-Identifier: Apache-2.0
"""Writers with the methods of TensorBoard's, MLflow's and Weights & Biases' own, over :func:`hansa.client.log`.

A script that imports one of them from ``nvflare.client.tracking`` imports it from here instead. What they are given
goes to the site's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hansa.client.script import AnalyticsDataType, log


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
